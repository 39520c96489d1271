"""The layout of the house: storeys, budgets and who may touch what; every rule is also shown to be able to fail."""

import ast
import re
import statistics
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tdconcepts"

# A room is a folder or a file directly below tdconcepts/. It imports lower storeys only, never a neighbour: neighbours
# meet in a TensorDict. The words of storey 0 are one room in several files.
STOREYS = {
    **dict.fromkeys(["errors", "keys", "tunables"], 0),
    "hooks": 1,
    **dict.fromkeys(["attribution", "lrp", "perturbation", "concepts", "interventions", "experiments"], 2),
    **dict.fromkeys(["representations", "weights"], 2),
    "metrics": 3,
    **dict.fromkeys(["rl", "tuning", "scale", "report"], 4),
    "demo": 5,
    "__main__": 6,
}
FACADE = ""  # tdconcepts/__init__.py: sees every room, and only the topmost storeys see it

LINES, MEDIAN_LINES, PUBLIC_NAMES, PARAMETERS, LEVELS = 400, 200, 8, 7, 2
NAMELESS = {"base", "common", "helpers", "misc", "utils"}
TENSORDICT_MODULES = {"TensorDictModuleBase", "TensorDictModule", "TensorDictSequential", "TensorDictModuleWrapper"}
TENSORDICT_MODULES |= {"ProbabilisticTensorDictModule", "ProbabilisticTensorDictSequential"}

SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
MODULES = {name: path for name, path in SOURCES.items() if path.name != "__init__.py"}


# ---------------------------------------------------------------------------------------------------- what is read


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else FACADE


def imported(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """Every module that is imported: at the top, in functions and under TYPE_CHECKING alike."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the storey"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in known else str(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_extra", "import_module")):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def parse(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(encoding="utf-8"))


def ours(module: str, tree: ast.AST, known: set[str]) -> list[str]:
    return [name for name in imported(tree, known) if name.split(".")[0] == "tdconcepts" and name != module]


def public_names(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and [getattr(t, "id", None) for t in node.targets] == ["__all__"]:
            return [str(name) for name in ast.literal_eval(node.value)]
    return None


# ------------------------------------------------------------------------------------------------------- the rules


def wrong_storeys(module: str, tree: ast.AST, known: set[str]) -> list[str]:
    here = room(module)
    if here == FACADE:
        return []
    if here not in STOREYS:
        return [f"{here} has no storey: add it to STOREYS"]
    wrong = []
    for name in ours(module, tree, known):
        there = room(name)
        if there == here or (there == FACADE and STOREYS[here] >= 5):
            continue
        if there == FACADE:
            wrong.append(f"{module} imports the facade: name the module that it needs")
        elif there not in STOREYS:
            wrong.append(f"{module} imports {name}, which has no storey")
        elif STOREYS[there] > STOREYS[here] or (STOREYS[there] == STOREYS[here] and STOREYS[here] > 0):
            wrong.append(f"{module} (storey {STOREYS[here]}) imports {name} (storey {STOREYS[there]})")
    return wrong


def cycle(graph: dict[str, list[str]]) -> list[str]:
    """One cycle of imports, or an empty list."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        found = next((c for c in (visit(n, [*path, name]) for n in graph.get(name, [])) if c), [])
        done.add(name)
        return found

    return next((c for c in (visit(name, []) for name in graph) if c), [])


def wrong_header(module: str, tree: ast.Module) -> list[str]:
    wrong = []
    first, *rest = (ast.get_docstring(tree) or "").splitlines() or [""]
    if not first.endswith((".", "?")) or (rest and rest[0]):
        wrong.append(f"{module}: the docstring starts with one line that ends in a full stop, then a blank line")
    names = public_names(tree)
    if module.endswith("__main__"):
        return wrong
    if names is None:
        return [*wrong, f"{module} has no __all__"]
    if len(names) > PUBLIC_NAMES:
        wrong.append(f"{module} has {len(names)} public names, the limit is {PUBLIC_NAMES}")
    return wrong


def wrong_constructors(module: str, tree: ast.Module) -> list[str]:
    names = public_names(tree) or []
    counts = {c.name: parameters(c) for c in tree.body if isinstance(c, ast.ClassDef) and c.name in names}
    return [
        f"{module}.{name} takes {count} parameters, the limit is {PARAMETERS}"
        for name, count in counts.items()
        if count > PARAMETERS
    ]


def parameters(cls: ast.ClassDef) -> int:
    """What a constructor takes, ``self`` not counted; for a dataclass its fields."""
    for node in cls.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs) - 1
    if not any("dataclass" in ast.unparse(d) for d in cls.decorator_list):
        return 0
    fields = (node for node in cls.body if isinstance(node, ast.AnnAssign))
    return sum("ClassVar" not in ast.unparse(f.annotation) and "init=False" not in ast.unparse(f) for f in fields)


def levels(bases: dict[str, list[str]]) -> dict[str, int]:
    """How many classes of ours lie between each class and the one of tensordict that it comes from."""

    def level(name: str) -> int:
        if name in TENSORDICT_MODULES:
            return 0
        below = [level(base) for base in bases.get(name, [])]
        return max((b + 1 for b in below if b >= 0), default=-1)

    return {name: level(name) for name in bases}


def base_names(tree: ast.Module) -> dict[str, list[str]]:
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {c.name: [ast.unparse(base).split("[")[0].split(".")[-1] for base in c.bases] for c in classes}


def reaches_inside(tree: ast.AST) -> list[str]:
    """What only hooks/ may do: register hooks, replace a forward, call autograd, use a function mode."""
    found = []
    for node in ast.walk(tree):
        text = ""
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if node.attr == "forward" and isinstance(node.ctx, ast.Store):
                found.append(f"{text} = ...")
        elif isinstance(node, ast.Name):
            text = node.id
        elif isinstance(node, ast.ImportFrom):
            found += [
                f"from {node.module} import {a.name}" for a in node.names if AUTOGRAD.search(f"{node.module}.{a.name}")
            ]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr" and "'forward'" in ast.unparse(node):
            found.append(ast.unparse(node))
        if re.search(r"(^|\.)register_\w*hook$", text) or AUTOGRAD.search(text):
            found.append(text)
    return found


AUTOGRAD = re.compile(
    r"(autograd(\.functional)?\.(grad|backward|jacobian|hessian|vjp|jvp)|Torch(Function|Dispatch)Mode)$"
)


# -------------------------------------------------------------------------------------------------- the house as is


@pytest.mark.parametrize("module", SOURCES)
def test_a_room_imports_lower_storeys_only(module):
    assert wrong_storeys(module, parse(module), set(SOURCES)) == []


def test_no_import_cycle():
    assert cycle({module: ours(module, parse(module), set(SOURCES)) for module in SOURCES}) == []


@pytest.mark.parametrize("module", MODULES)
def test_header_and_public_names(module):
    assert wrong_header(module, parse(module)) == []


@pytest.mark.parametrize("module", sorted(set(SOURCES) - set(MODULES)))
def test_a_facade_has_a_docstring_and_no_logic(module):
    tree = parse(module)
    assert ast.get_docstring(tree)
    allowed = {"__getattr__", "__dir__"}  # a room that needs an extra is imported when it is first used
    assert [n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name not in allowed] == []


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_its_test_and_a_name_that_says_something(module):
    path = MODULES[module].relative_to(PACKAGE)
    assert not NAMELESS & set(module.split("."))
    assert (ROOT / "tests" / path.parent / f"test_{path.stem.strip('_')}.py").is_file()


def test_length_budget():
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert {module: n for module, n in lines.items() if n > LINES} == {}
    assert statistics.median(lines.values()) <= MEDIAN_LINES


@pytest.mark.parametrize("module", MODULES)
def test_constructors_are_short(module):
    assert wrong_constructors(module, parse(module)) == []


def test_shallow_hierarchy():
    bases: dict[str, list[str]] = {}
    for module in MODULES:
        for name, names in base_names(parse(module)).items():
            bases[name] = bases.get(name, []) + names
    assert {name: n for name, n in levels(bases).items() if n > LEVELS} == {}


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) not in {"rl", "demo"}])
def test_only_rl_imports_torchrl(module):
    assert [n for n in imported(parse(module), set()) if n.split(".")[0] == "torchrl"] == []


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) != "hooks"])
def test_only_hooks_reach_inside_a_model(module):
    assert reaches_inside(parse(module)) == []


def test_every_dependency_is_pinned_to_a_version_it_allows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: needs for name, needs in project["optional-dependencies"].items() if name != "scale"}  # not tested
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    needed = [Requirement(text) for texts in (project["dependencies"], *extras.values()) for text in texts]
    needed = [need for need in needed if need.name != project["name"]]
    assert [str(n) for n in needed if not n.specifier.contains(pins.get(canonicalize_name(n.name), "0"))] == []


# ------------------------------------------------------------------------------------------- the rules can fail too

KNOWN = {"tdconcepts", "tdconcepts.keys", "tdconcepts.hooks.sites", "tdconcepts.lrp.rules", "tdconcepts.metrics.flips"}


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("tdconcepts.lrp.rules", "from tdconcepts.hooks.sites import Site", 0),
        ("tdconcepts.lrp.rules", "from tdconcepts.lrp import forms", 0),
        ("tdconcepts.keys", "from tdconcepts.errors import BadKey", 0),
        ("tdconcepts.demo.agent", "import tdconcepts as tdc", 0),
        ("tdconcepts", "from tdconcepts.metrics import flips", 0),
        ("tdconcepts.hooks.sites", "from tdconcepts.lrp.rules import Rule", 1),
        ("tdconcepts.hooks.sites", "from tdconcepts import keys", 0),
        ("tdconcepts.hooks.sites", "from tdconcepts import Target", 1),
        ("tdconcepts.attribution.gradient", "import tdconcepts.lrp.rules", 1),
        ("tdconcepts.attribution.gradient", "def f():\n    from tdconcepts.metrics import flips", 1),
        ("tdconcepts.attribution.gradient", "if TYPE_CHECKING:\n    from tdconcepts.metrics import flips", 1),
        ("tdconcepts.attribution.gradient", "from tdconcepts.cellar import wine", 1),
        ("tdconcepts.cellar.wine", "import torch", 1),
    ],
)
def test_rule_storeys(module, source, wrong):
    assert len(wrong_storeys(module, ast.parse(source), KNOWN)) == wrong


def test_rule_sees_every_import():
    source = "import a.b\nfrom c import d, e\ndef f():\n    errors.import_extra('torchrl.envs', 'rl')"
    assert sorted(imported(ast.parse(source), {"c.d"})) == ["a.b", "c", "c.d", "torchrl.envs"]


def test_rule_cycle():
    assert cycle({"a": ["b"], "b": ["c"], "c": []}) == []
    assert cycle({"a": ["b", "c"], "b": ["c"], "c": ["d"], "d": ["b"]}) == ["b", "c", "d", "b"]


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ('"""One line."""\n__all__ = ["f"]\ndef f(): pass\ndef _g(): pass', 0),
        ('"""One line.\n\nMore."""\n__all__ = []', 0),
        ('"""One line that\ngoes on."""\n__all__ = []', 1),
        ("__all__ = []", 1),
        ('"""One line."""', 1),
        ('"""One line."""\n__all__ = ["a", "b", "c", "d", "e", "f", "g", "h", "i"]', 1),
    ],
)
def test_rule_header(source, wrong):
    assert len(wrong_header("tdconcepts.lrp.rules", ast.parse(source))) == wrong


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("class A:\n    def __init__(self, a, b, *rest, c=1, **more): pass", 3),
        ("@dataclass(frozen=True)\nclass A:\n    a: int\n    b: int = 1\n    c: ClassVar[int] = 2", 2),
        ("@dataclass\nclass A:\n    a: int\n    b: int = field(init=False)", 1),
        ("class A:\n    a: int", 0),
    ],
)
def test_rule_parameters(source, count):
    assert parameters(ast.parse(source).body[0]) == count


def test_rule_constructors():
    source = "__all__ = ['A']\nclass {}:\n    def __init__(self, a, b, c, d, e, f, g, h): pass"
    assert len(wrong_constructors("m", ast.parse(source.format("A")))) == 1
    assert wrong_constructors("m", ast.parse(source.format("_Private"))) == []


def test_rule_levels():
    source = "class A(nn.TensorDictModuleBase): ...\nclass B(A): ...\nclass C(Mixin, B): ...\nclass D(dict): ..."
    assert levels(base_names(ast.parse(source))) == {"A": 1, "B": 2, "C": 3, "D": -1}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("y = module.forward(x)", 0),
        ("loss.backward()", 0),
        ("class F(torch.autograd.Function): ...", 0),
        ("module.register_forward_hook(f)", 1),
        ("hook = module.register_full_backward_pre_hook", 1),
        ("torch.autograd.grad(y, x)", 1),
        ("from torch.autograd import grad", 1),
        ("module.forward = f", 1),
        ("setattr(module, 'forward', f)", 1),
        ("from torch.overrides import TorchFunctionMode", 1),
        ("class M(overrides.TorchFunctionMode): ...", 1),
    ],
)
def test_rule_reaches_inside(source, found):
    assert len(reaches_inside(ast.parse(source))) == found
