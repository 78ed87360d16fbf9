"""Where workers run: as processes of this machine, on a Ray cluster, as jobs of Slurm."""

from attnsurgery.search.workers.launch._base import LAUNCHERS, Gone, Heard, Launcher, Link, Message

__all__ = ["LAUNCHERS", "Gone", "Heard", "Launcher", "Link", "Message"]
