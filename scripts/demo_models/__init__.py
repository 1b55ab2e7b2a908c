"""The recipes of the demo models that ship inside mdeploy.

Each recipe is data, a training script and a check of the exported directory.
This room needs torch and transformers; nothing in `mdeploy/` may import it.
"""
