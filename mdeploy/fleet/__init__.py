"""Many services in one file: read and checked, compared with what runs, applied, and taken back."""

from mdeploy.fleet.apply import Applied, Outcome, diff, down, prepare_specs, preview, rollback, up
from mdeploy.fleet.plan import Listener, Step

__all__ = ["Applied", "Listener", "Outcome", "Step", "diff", "down", "prepare_specs", "preview", "rollback", "up"]
