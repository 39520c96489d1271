"""Every python block of README.md and docs/*.md runs, file by file, top to bottom, in one namespace.

What a block prints is compared with the ```` ```output ```` block that follows it, where there is one (``...`` stands
for anything, as in doctests). A block that can't run anywhere is marked ```` ```python no-run ````.
"""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import tensordict.nn

import tdconcepts

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")] if path.is_file())
FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>`{3,}) *(?P<info>[^`\n]*)\n(?P<body>.*?)^(?P=indent)(?P=ticks) *$", re.M | re.S
)
OPTIONAL = {"gymnasium", "jinja2", "matplotlib", "optuna", "ray", "sklearn", "torchrl", "tqdm", "transformers"}


class Block(NamedTuple):
    line: int  # of the first line of code
    code: str
    output: str | None


def blocks(text: str) -> list[Block]:
    found: list[Block] = []
    for match in FENCE.finditer(text):
        info, body = match["info"].split(), re.sub(f"^{match['indent']}", "", match["body"], flags=re.M)
        if info[:1] == ["python"] and "no-run" not in info:
            found.append(Block(text[: match.start("body")].count("\n") + 1, body, None))
        elif info[:1] == ["output"]:
            assert found, "an output block follows the python block that prints it"
            assert found[-1].output is None, "one output block for each python block"
            found[-1] = found[-1]._replace(output=body)
    return found


def run(text: str, name: str) -> None:
    module = sys.modules["page"] = ModuleType("page")  # so that classes of a page can be pickled, dataclasses made
    try:
        for block in blocks(text):
            code = compile("\n" * (block.line - 1) + block.code, name, "exec", dont_inherit=True)
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, vars(module))
            check_output(block, printed.getvalue(), name)
    finally:
        del sys.modules["page"]


def check_output(block: Block, printed: str, name: str) -> None:
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    checker = doctest.OutputChecker()
    if block.output is not None and not checker.check_output(block.output, printed, options):
        difference = checker.output_difference(doctest.Example("", block.output), printed, options)
        pytest.fail(f"{name}, line {block.line}: {difference}", pytrace=False)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_page(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what a page writes stays here
    try:
        run(path.read_text(encoding="utf-8"), str(path))
    except ImportError as error:
        missing = str((error.__cause__ or error).name or "").partition(".")[0]
        if missing not in OPTIONAL:
            raise
        pytest.skip(f"the page needs {missing}, which is not installed")


def test_the_api_page_has_every_room():
    rooms = {m.name for m in pkgutil.iter_modules(tdconcepts.__path__)} - {"__main__", "demo"}
    shown = re.findall(r"automodule:: tdconcepts\.(\w+)", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(rooms)


PYC = """
Annotations AnnotatedTensor ConceptGraph Backbone ImageBackbone TextBackbone Variable ConceptVariable EmbeddingVariable
seed_everything ConceptLayer BaseConceptLayer BaseGraphLearner BaseModel InterventionStrategy
ConceptInterventionStrategy ModuleInterventionStrategy InterventionPolicy LazyConstructor LearnablePrior FixedPrior
TiedPrior TrilActivation
GlobalScale DefaultActivation LinearEmbeddingToConcept MLPEmbeddingToConcept ConceptWhitening WhitenedEmbeddingToConcept
CAVEmbeddingToConcept LinearConceptToConcept MLPConceptToConcept CallableConceptToConcept
HyperlinearConceptEmbeddingToConcept MixConceptEmbeddingToConcept MixConceptEmbeddings Dense ResidualMLP MLP Sequential
LinearEmbeddingEncoder MLPEmbeddingEncoder SelectorEmbeddingEncoder WANDAGraphLearner PyCLoss CompositeLoss ConceptLoss
ConceptSubset WeightedConceptLoss DepthWeightedConceptLoss L1LogitRegularizer MSEReconstructionLoss KLDivergenceLoss
OrthogonalityLoss NLLProbLoss LossWeightWarmup ConceptMetrics compute_cace InferenceOutput BlackBox BlackBoxTaskOnly
ConceptBottleneckModel ConceptEmbeddingModel ConceptBottleneckVAE ConditionalVAE GraphConceptBottleneckModel
CausallyReliableConceptBottleneckModel ParametricFactor ParametricCPD ParametricPotential ProbabilisticModel
BayesianNetwork MarkovNetwork BaseInference TorchBaseInference ForwardInference DeterministicInference
AncestralSamplingInference MAPForwardInference RejectionSampling IndependentInference ImportanceSampling BaseProposal
MutilatedNetworkProposal BeliefPropagation PgmpyVariableElimination PyroBaseInference PgmpyBaseInference
VariationalInference InterventionModule GroundTruthIntervention DoIntervention DistributionIntervention
PositiveWeightsIntervention intervention UniformPolicy UncertaintyInterventionPolicy RandomPolicy GradientPolicy
replace_expand_cols grouped_concept_exogenous_mixture concept_orthogonality selection_eval linear_equation_eval
linear_equation_expl logic_rule_eval logic_memory_reconstruction logic_rule_explanations selective_calibration
confidence_selection soft_select completeness_score intervention_score tcav_score number_of_effective_concepts
number_of_contributing_concepts cace_score residual_concept_causal_effect edge_type custom_hamming_distance
prune_linear_layer minimize_constr CMRSemantic ProductTNorm GodelTNorm distributions.Delta
data.base data.datasets data.datamodules data.generation data.preprocessing data.scalers data.splitters data.utils
data.io BnLearnDataset ToyDataset CompletenessDataset ToyDAGDataset CelebADataset PendulumDataset MNISTEvenOddDataset
MNISTAdditionDataset ColorMNISTDataset MNISTArithmeticDataset DSpritesRegressionDataset AWA2Dataset CUBDataset
BnLearnDataModule ToyDAGDataModule CompletenessDataModule CelebADataModule PendulumDataModule ColorMNISTDataModule
MNISTArithmeticDataModule DSpritesRegressionDataModule AWA2DataModule CUBDataModule
SteerlingModel SteerlingLowLevelModel SteerlingLowLevelModelPrototypes top_concepts DEFAULT_MODEL_ID
"""  # every public name of torch_concepts 1.0.0a7, its semantics of rules and its Steerling models


def sides_of_pyc() -> tuple[str, str]:
    """The code spans of what is PyC's (left cells, text), and of what is named in its place (last cells)."""
    page = FENCE.sub("", (ROOT / "docs" / "coming_from_pyc.md").read_text(encoding="utf-8"))
    row = re.compile(r"^(\|.*\|)(.*)\|$", re.M)
    rest, here = row.sub(r"\1", page), " ".join(found[1] for found in row.findall(page))
    return " ".join(re.findall(r"`([^`]+)`", rest)), " ".join(re.findall(r"`([^`]+)`", here))


def test_every_public_name_of_pyc_has_its_place():
    theirs, _ = sides_of_pyc()
    assert [name for name in PYC.split() if not re.search(rf"(?<![\w.]){re.escape(name)}\b", theirs)] == []


def test_what_is_named_in_place_of_pyc_exists():
    _, ours = sides_of_pyc()
    rooms = {m.name: importlib.import_module(f"tdconcepts.{m.name}") for m in pkgutil.iter_modules(tdconcepts.__path__)}
    known = {name for room in (tdconcepts, tensordict.nn, *rooms.values()) for name in getattr(room, "__all__", ())}
    classes = set(re.findall(r"(?<![\w\"])[A-Z][a-z]\w*", ours))
    assert len(classes) > 40
    assert sorted(classes - known - {"Generator", "True"}) == []
    dotted = re.findall(r"\b(concepts|metrics|representations)\.(\w+)", ours)
    assert [(room, name) for room, name in dotted if name not in rooms[room].__all__] == []


PAGE = """
# A page

```python
x = 1
print("one", x / 3)
```

Prints:

```output
one 0.33...
```

```bash
exit 1
```

```python no-run
1 / 0
```

* In a list:

  ```python
  assert x == 1
  ```
"""


def test_blocks_are_found_with_their_lines():
    assert [(block.line, block.output) for block in blocks(PAGE)] == [(5, "one 0.33...\n"), (26, None)]
    assert blocks(PAGE)[1].code == "assert x == 1\n"


def test_a_good_page_passes():
    run(PAGE, "page.md")


def test_another_output_fails():
    with pytest.raises(pytest.fail.Exception, match=r"page\.md, line 5"):
        run(PAGE.replace("one 0.33", "two 0.33"), "page.md")


def test_an_error_names_the_line_of_the_page():
    with pytest.raises(AssertionError) as caught:
        run(PAGE.replace("x == 1\n", "x == 2\n"), "page.md")
    assert (str(caught.traceback[-1].path), caught.traceback[-1].lineno + 1) == ("page.md", 26)
