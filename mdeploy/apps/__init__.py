"""The processes of services that mdeploy serves itself: `python -m mdeploy.apps KIND …`, started by a supervisor."""
