"""Packages import only lower ones (see CONTRIBUTING.md), and no modules import each other in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
COMMANDS = {"train", "eval", "predict", "convert", "compare", "check", "export", "console", "__main__"}
# From the bottom up; each may import those before it.
LAYERS = [
    *("errors", "settings", "remote", "boxes", "ops", "models", "data", "weights"),
    *("inference", "evaluation", "reporting", "training", "cli", "commands", "main"),
]


def modules() -> dict[str, Path]:
    """All modules of the package by name, without its ``__init__``, which imports lazily."""
    found = {}
    for path in (SOURCE / "cpm_rcnn").rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name != "cpm_rcnn" and parts[1] not in ("conf", "kernels"):
            found[name] = path
    return found


def imports() -> dict[str, set[str]]:
    """The modules of the package that each module imports."""
    known = modules()
    graph = {}
    for name, path in known.items():
        targets = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                candidates = [f"{node.module}.{alias.name}" for alias in node.names]
                targets |= {each if each in known else node.module for each in candidates}
        graph[name] = {target for target in targets if target in known and target != name}
    return graph


def layer(name: str) -> int:
    part = name.split(".")[1]
    return LAYERS.index("main" if part in COMMANDS else part)


def test_packages_import_only_lower_ones():
    upward = [
        f"{name} imports {target}"
        for name, targets in imports().items()
        for target in targets
        if layer(target) > layer(name)
    ]
    assert not upward


def test_no_modules_import_each_other_in_a_circle():
    graph = imports()
    # A package imports its own modules to export them; only imports between modules can form a circle.
    leaves = {name: {t for t in targets if not name.startswith(f"{t}.")} for name, targets in graph.items()}
    assert len(list(TopologicalSorter(leaves).static_order())) == len(graph)


def test_models_and_settings_know_nothing_of_files_and_configs():
    for name, path in modules().items():
        if name.split(".")[1] in ("settings", "models"):
            text = path.read_text()
            assert "cpm_rcnn.weights" not in text or "import" not in text.split("cpm_rcnn.weights")[0][-12:], name
            for word in ("omegaconf", "hydra", "torch.load", "open("):
                assert word not in text, (name, word)


def test_every_package_is_listed_for_the_wheel():
    listed = (SOURCE.parent / "pyproject.toml").read_text()
    for path in (SOURCE / "cpm_rcnn").rglob("__init__.py"):
        package = ".".join(path.relative_to(SOURCE).parts[:-1])
        if package.split(".")[-1] not in ("conf", "kernels"):
            assert f'"{package}",' in listed, package
