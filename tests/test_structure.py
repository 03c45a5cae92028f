"""The rules that keep the code in shape: who may import whom, and what every module begins with."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGE_MODULES = (
    "probing", "answers", "phrases", "vocabulary", "image_embeddings", "embeddings", "activations", "precision",
    "exemplars", "patches", "scores", "clusters", "explanations", "validation", "chance", "neurons", "traits",
    "coverage", "drawn", "truth", "screen", "pairs", "ablation", "causes", "benchmark", "report",
)  # fmt: skip
FORBIDDEN = {
    "flows": {"torch", "open_clip", "vllm", "timm", "torchvision"},
    "tasks": {"ray", "hydra", "omegaconf", "flows"},
}
MODULES = [path for folder in FORBIDDEN for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_and_docstrings(path):
    found = set(imports(path))
    folder = path.relative_to(ROOT).parts[0]
    assert not {name.split(".")[0] for name in found} & FORBIDDEN[folder]
    if folder == "tasks" and path.stem in STAGE_MODULES:
        others = {f"tasks.{name}" for name in STAGE_MODULES if name != path.stem}
        assert not found & others
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_only_one_file_knows_ray():
    users = [path.name for path in MODULES if "ray" in {name.split(".")[0] for name in imports(path)}]
    assert users == ["stage.py"]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
