"""The serving core: an HTTP edge, a pool of worker processes, and the contract of the classes they run.

`handler`, `load`, `runner`, `wire`, `worker` and `bootstrap` import nothing but the standard library: they
also run in a user's own interpreter, which knows nothing of mdeploy or FastAPI.
"""
