"""Stage answers: a language model is asked for concepts.

In: prompts and the settings of the model. Out: the answers table, one row per prompt with all that was said. One part
is one call with a fixed slice of the prompts, so a finished part is never asked again.
"""

from dataclasses import dataclass, field
from functools import cached_property

from tasks.llm import ENGINES, LlmSettings, Openai, Vllm, check_budget, parse_answer
from tasks.prompting import Prompt
from tasks.store import Folder, PartReport
from tasks.tables import make_table


@dataclass
class AnswersJob:
    out: Folder
    prompts: list[Prompt]
    settings: LlmSettings
    max_concepts: int
    """Phrases per answer."""
    earlier: list[Folder] = field(default_factory=list)
    """Answers of the run's earlier rounds, which count against its ceilings."""


class AnswersWorker:
    """Holds one engine and asks it one slice of the prompts at a time."""

    def __init__(self, job: AnswersJob) -> None:
        self.job = job

    @cached_property
    def engine(self) -> Vllm | Openai:
        return ENGINES[self.job.settings.protocol](self.job.settings, self.job.max_concepts)

    def run(self, part: int) -> PartReport:
        report, job = PartReport(part), self.job
        prompts = job.prompts[part * job.settings.shard_size :][: job.settings.shard_size]
        with report.phase("read"):
            check_budget(job.settings, prompts, *self._used())
        with report.phase("compute"):
            answers = self.engine.ask(prompts)
        columns = {
            "prompt_id": [prompt.prompt_id for prompt in prompts],
            "family": [prompt.family for prompt in prompts],
            "sources": [list(prompt.sources) for prompt in prompts],
            "prompt": [prompt.text for prompt in prompts],
            "answer": [answer.text.encode(errors="replace").decode() for answer in answers],  # no lone surrogates
            "input_tokens": [answer.input_tokens for answer in answers],
            "tokens": [answer.tokens for answer in answers],
            "status": [parse_answer(answer.text)[1] for answer in answers],
        }
        table = make_table("answers", columns)
        with report.phase("write"):
            # The same command may run twice, and phrases be made from what the other was told: the first answers stay.
            if part in job.out.done():
                table = job.out.read("answers", part)
            else:
                job.out.write(part, {"answers": table})
        status = table["status"].to_pylist()
        report.rows = {"answers": len(status), "tokens": sum(table["tokens"].to_pylist())}
        report.skipped = {f"{s} answer": n for s in ("truncated", "malformed") if (n := status.count(s))}
        return report

    def _used(self) -> tuple[int, int]:
        """Tokens of the parts that are done, by whichever run."""
        if self.job.settings.max_total_tokens is None and self.job.settings.max_cost is None:
            return 0, 0
        folders = [*self.job.earlier, self.job.out]
        used = [f.read("answers", p, columns=["input_tokens", "tokens"]) for f in folders for p in f.done()]
        input_tokens, tokens = (sum(sum(t[c].to_pylist()) for t in used) for c in ("input_tokens", "tokens"))
        return input_tokens, tokens
