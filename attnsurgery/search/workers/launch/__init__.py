"""Where workers run: as processes of this machine, on a Ray cluster, as jobs of Slurm."""

from attnsurgery.search.workers.launch._base import LAUNCHERS, Launcher, Link, Message, OnMessage, WorkerExited

__all__ = ["LAUNCHERS", "Launcher", "Link", "Message", "OnMessage", "WorkerExited"]
