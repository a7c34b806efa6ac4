"""The shape of the code: layers, imports, lines, and words that the contributors' list forbids.

Reads the files that git tracks, and imports the declarations of stages. Prints a table, and as its last line one JSON
object.
"""

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from statistics import mean, median, quantiles

from pipeline.build import STAGES
from pipeline.graph.stages import Stage

ROOT = Path(__file__).parents[1]
SOURCE = ("unclip", "pipeline", "models", "jobs", "cluster", "serve")
DOCSTRINGS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
RENDERER = "jobs/output.py"  # which prints for all commands
PROSE = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs", *SOURCE)
TICS = (
    r"(?<!there )\b(?:is|are) no (?!longer)",
    r"\bso many\b",
    r"\bwhoever\b",
    r"\banew\b",
    r"\bhangs? on\b",
    r"\bof theirs\b",
    r"\bof now\b",
    r"\bat its turn\b",
    r"\bby heart\b",
    r"\bit is told\b",
    r"\bsaid aloud\b",
    r"\btaught\b",
    r"\bdear(?:er|est)?\b",
    r"\blearnt from\b",
    r"\bno number\b(?! of)",
    r"\bwho only looks\b",
)
NO_NOUN = re.compile(  # what a field's explanation does not begin with
    r"`*(?:what|which|who|whom|whose|where|when|whether|how|why|of|in|on|at|by|for|from|to|with|without|above|below|"
    r"beside|between|after|before|until|as|than|into|over|under|per|among|that|if|about)\b",
    re.IGNORECASE,
)


def tracked(*folders: str, ends: str = ".py") -> list[Path]:
    """Returns the tracked files under these folders, or these files themselves, whose names end so."""
    listed = subprocess.run(["git", "ls-files", "--", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.splitlines() if name.endswith(ends) and (ROOT / name).is_file()]


def module_name(file: Path) -> str:
    """Returns the dotted name of a module's file."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def code_lines(text: str) -> int:
    """Returns the number of lines that hold code: no blank lines, comments or docstrings."""
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            held.update(range(token.start[0], token.end[0] + 1) if token.string else ())
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCSTRINGS) and ast.get_docstring(node, clean=False) is not None:
            held -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(held)


def imports(tree: ast.AST, known: set[str]) -> set[str]:
    """Returns the modules among ``known`` that a module imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= below or {node.module}
    return found & known


def inside_functions(tree: ast.AST) -> int:
    """Returns how many import statements stand inside functions."""
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    found = {
        node for function in functions for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)
    }
    return len(found)


def room(name: str) -> str:
    """Returns the folder of pipeline that a module lies in, or the file; models, jobs and cluster are one room each."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "pipeline" and len(parts) > 1 else parts[0]


def floors(graph: dict[str, set[str]]) -> tuple[int, int]:
    """Returns the length of the longest chain of imports between rooms or files, and the number of circles."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(node: str, through: dict[str, set[str]], out: list[str]) -> None:
        seen.add(node)
        for other in sorted(through[node] - seen):
            if other not in seen:
                visit(other, through, out)
        out.append(node)

    for node in graph:
        if node not in seen:
            visit(node, graph, order)
    reverse: dict[str, set[str]] = {node: set() for node in graph}
    for node, others in graph.items():
        for other in others:
            reverse[other].add(node)
    seen.clear()
    circle: dict[str, int] = {}
    circles = 0
    for node in reversed(order):
        if node not in seen:
            members: list[str] = []
            visit(node, reverse, members)
            circles += len(members) > 1
            circle |= dict.fromkeys(members, len(circle))
    height: dict[str, int] = {}
    for node in order:  # what is imported comes first
        below = (height.get(other, 0) for other in graph[node] if circle[other] != circle[node])
        height[node] = 1 + max(below, default=0)
    return max(height.values()), circles


def prose(file: Path) -> Iterator[tuple[int, str]]:
    """Yields the lines of a page, or the comments and strings of a module, with their numbers."""
    text = file.read_text()
    if file.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)):
            yield from enumerate(token.string.splitlines(), token.start[0])


def tics() -> list[str]:
    """Returns every place where a page, a comment or a string uses words of the list, as file:line: text."""
    words = re.compile("|".join(TICS), re.IGNORECASE)
    files = (*tracked(*PROSE, ends=".md"), *tracked(*SOURCE))
    return [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in files
        for number, line in prose(file)
        if words.search(line)
    ]


def nounless() -> list[str]:
    """Returns the lines under Attributes and Args whose explanation begins without a noun, each after its file."""
    found: list[str] = []
    for file in tracked(*SOURCE):
        nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, DOCSTRINGS)]
        for section in (part for node in nodes for part in re.split(r"\n(?=\S)", ast.get_docstring(node) or "")):
            lines = re.findall(r"^    (\w[\w, `*]*: )(.*)", section, re.MULTILINE)
            if section.startswith(("Attributes:", "Args:")):
                found += [f"{file.relative_to(ROOT)}: {name}{text}" for name, text in lines if NO_NOUN.match(text)]
    return found


def naming_elsewhere(trees: Mapping[Path, ast.AST], stage: Stage) -> int:
    """Returns the number of modules that have its name as a string, outside its folder and those of its readers."""
    readers = {folder(each) for each in STAGES if stage.name in (each.name, *each.inputs)}
    return sum(
        any(isinstance(node, ast.Constant) and node.value == stage.name for node in ast.walk(tree))
        for file, tree in trees.items()
        if not readers & {*file.parents}
    )


def folder(stage: Stage) -> Path:
    """Returns the folder that a stage is declared in."""
    return Path(stage.run.__code__.co_filename).parent


def hand_lists(tree: ast.AST, stages: Collection[str]) -> int:
    """Returns the number of tuples, lists, sets and keys of dicts whose strings are names of two or more stages."""
    written = [
        node.keys if isinstance(node, ast.Dict) else node.elts
        for node in ast.walk(tree)
        if isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Dict)
    ]
    named = [{each.value for each in row if isinstance(each, ast.Constant)} for row in written]
    return sum(len(names) > 1 and names <= {*stages} for names in named)


def prints(tree: ast.AST) -> int:
    """Returns the number of calls of print and redirect_stdout."""
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return sum(getattr(call, "id", getattr(call, "attr", "")) in ("print", "redirect_stdout") for call in calls)


def import_graph() -> dict[str, set[str]]:
    """Returns our modules that each of our modules imports, at its top, in a function, or for types alone."""
    trees = {module_name(file): ast.parse(file.read_text()) for file in tracked(*SOURCE)}
    return {name: imports(tree, set(trees)) - {name} for name, tree in trees.items()}


def measure() -> dict[str, float]:
    """Returns the figures of the source by name."""
    files = tracked(*SOURCE)
    texts = {file: file.read_text() for file in files}
    trees = {file: ast.parse(text) for file, text in texts.items()}
    imported = import_graph()
    rooms: dict[str, set[str]] = {}
    for name, others in imported.items():
        rooms.setdefault(room(name), set()).update({room(other) for other in others} - {room(name), "pipeline"})
    rooms.pop("pipeline", None)
    height, circles = floors(rooms)
    lines = {file: code_lines(text) for file, text in texts.items()}
    total = sum(lines.values())
    fan_out = sorted(len(imported[module_name(file)]) for file in files if file.name != "__init__.py")
    # Models are called as the stages that train them, and know of no stage.
    above = {file: tree for file, tree in trees.items() if ROOT / "models" not in file.parents}
    return {
        "files_in_pipeline": len([file for file in (ROOT / "pipeline").glob("*.py") if file.name != "__init__.py"]),
        "rooms": len(rooms),
        "floors": height,
        "circles": circles,
        "circles_of_files": floors(imported)[1],
        "lines_of_code": total,
        "lines_of_tests": sum(code_lines(file.read_text()) for file in tracked("tests")),
        "files": len(files),
        "modules_elsewhere_that_name_a_stage_mean": mean(naming_elsewhere(above, stage) for stage in STAGES),
        "lists_of_stage_names": sum(
            hand_lists(tree, [stage.name for stage in STAGES])
            for file, tree in above.items()
            if not {*map(folder, STAGES)} & {*file.parents}
        ),
        "prints_outside_the_renderer": sum(prints(tree) for file, tree in trees.items() if file != ROOT / RENDERER),
        "imports_of_a_file_median": median(fan_out),
        "imports_of_a_file_p90": quantiles(fan_out, n=10)[-1],
        "imports_inside_functions_per_1000_lines": sum(map(inside_functions, trees.values())) / total * 1000,
        "tics": len(tics()),
        "fields_that_begin_without_a_noun": len(nounless()),
    }


def main() -> int:
    """Prints the figures. With --tics, prints where the words stand, and the fields that begin without a noun."""
    if "--tics" in sys.argv[1:]:
        print("\n".join(tics() + nounless()))
    found = measure()
    for name, value in found.items():
        print(f"  {name:45} {value:,.1f}")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
