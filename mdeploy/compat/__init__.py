"""Classes and start scripts written for modelserve and for easy-serve, on our core.

`modelserve`, `easyserve`, `adapter`, `djangohttp` and `devices` run in workers, in the user's own interpreter: they
import nothing but the standard library and `mdeploy.serving.handler`. The rest is the command line of modelserve
scripts: it runs beside the edge, in our own environment, and is imported only when it is used.
"""
