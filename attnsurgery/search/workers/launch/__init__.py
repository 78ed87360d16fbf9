"""Launchers of workers: processes of this machine, actors of a Ray cluster, jobs of Slurm."""

from attnsurgery.search.workers.launch._base import LAUNCHERS, Launcher, Link, Message, OnMessage, WorkerExited

__all__ = ["LAUNCHERS", "Launcher", "Link", "Message", "OnMessage", "WorkerExited"]
