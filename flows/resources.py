"""What workers may take of a machine or a cluster.

In: the config's group cluster. Out: the resources of each stage's workers; ValueError for what cannot be.
"""

import math
from dataclasses import asdict, dataclass, field, replace

from flows.run import TABLES


@dataclass
class Resources:
    """What one worker of a stage needs."""

    num_cpus: float = 1
    num_gpus: float = 0
    memory: int | None = None
    """Bytes that Ray reserves for the worker."""
    workers: int | None = None
    """Workers of the stage; default: cluster.default.workers, else as many as fit the cluster's nodes as they are."""
    retries: int = 3
    """How often a part is tried again after its worker died."""


@dataclass
class StageResources:
    """The same, where a stage differs from cluster.default; null where it does not."""

    num_cpus: float | None = None
    num_gpus: float | None = None
    memory: int | None = None
    workers: int | None = None
    retries: int | None = None


LEAST = {"num_cpus": 0.01, "num_gpus": 0, "memory": 1, "workers": 1, "retries": 0}


@dataclass
class ClusterSettings:
    ray: bool = True
    """False runs every stage in this process."""
    address: str | None = None
    """Running Ray cluster to join (auto, or ray://host:port); null starts one on this machine."""
    num_cpus: int | None = None
    """CPUs of a Ray started on this machine; default: its cores."""
    wait: float = 0
    """Seconds to wait for nodes where no node can hold a worker: an autoscaling cluster takes minutes to add one."""
    threads: int = 1
    """Torch threads of each worker; part of what decides the last bits of every number."""
    default: Resources = field(default_factory=Resources)
    stages: dict[str, StageResources] = field(default_factory=dict)
    """Resources by stage, where they differ from the default."""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"cluster.threads={self.threads}: must be at least 1")
        if self.wait < 0:
            raise ValueError(f"cluster.wait={self.wait:g}: must be at least 0")
        if self.address and not self.ray:
            raise ValueError(f"cluster.address={self.address}: needs cluster.ray=true")
        if self.num_cpus is not None and self.num_cpus < 1:
            raise ValueError(f"cluster.num_cpus={self.num_cpus}: must be at least 1")
        if unknown := [stage for stage in self.stages if stage not in TABLES]:
            raise ValueError(f"cluster.stages.{unknown[0]}: no such stage; allowed are {', '.join(TABLES)}")
        given = {"default": self.default} | {f"stages.{stage}": need for stage, need in self.stages.items()}
        for place, need in given.items():
            for key, value in asdict(need).items():
                if value is not None and not LEAST[key] <= value < math.inf:
                    raise ValueError(f"cluster.{place}.{key}={value:g}: must be at least {LEAST[key]}")

    def resources(self, stage: str) -> Resources:
        """`workers` is null where the stage has no number of its own."""
        own = asdict(self.stages.get(stage, StageResources()))
        return replace(self.default, **{k: v for k, v in own.items() if v is not None or k == "workers"})

    def on_gpu(self, stage: str) -> bool:
        """Whether the workers of a stage hold GPUs."""
        return self.ray and self.resources(stage).num_gpus > 0
