"""Writes the pages of `docs/criteria/` and the table of `docs/selectors.md`: `python docs/criterion_pages.py`.

What a method costs, which end it drops and what was measured come from the package's own tables and from
`benchmarks/RESULTS.md`; a test holds the pages to them. Formulas, sources and remarks are written here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from resofilter_trainer.compare.config import SelectorConfig
from resofilter_trainer.compare.methods import METHODS
from resofilter_trainer.criteria.criterion import CRITERIA
from resofilter_trainer.model.signals import SIGNALS
from resofilter_trainer.scoring.further_signals import ALL_SIGNALS
from resofilter_trainer.selecting.data_selector import DataSelector

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "RESULTS.md"
DATA = ("40% wrong", "20% wrong", "No wrong rows")  # headings of RESULTS.md
BEGIN, END = "<!-- from docs/criterion_pages.py -->\n", "<!-- end -->"
COSTS = {  # in words, where it depends on the comparison
    "less": "3 for each of its 4 epochs, and its warm-up",
    "nuggets": "2 for each validation row",
    "token_fixed": "2, and the training of a reference model",
    "token_rho": "2, and the training of a reference model",
    "token_self_evolving": "1, and 1 in every epoch",
}
ENDS = {"selectit": "smallest", "nuggets": "smallest", "less": "smallest"}  # as `compare.method_scores` scores them
UNMEASURED = "not measured"


@dataclass(frozen=True)
class Page:
    """What a person writes of a criterion.

    Attributes:
        title: the heading.
        methods: the methods of `resofilter compare` that it is about; the first names the file.
        formula: how it is computed.
        source: where it comes from.
        needs: what it needs beside the rows.
        fails: when it fails, in a few words, for all its methods or for each; from `benchmarks/RESULTS.md`.
        note: what else to know.
        criterion: its name in `resofilter score --criterion`; empty if it has none.
        signal: its name in `resofilter score --signals`; empty if it has none.
    """

    title: str
    methods: tuple[str, ...]
    formula: str
    source: str
    needs: str
    fails: str | dict[str, str]
    note: str = ""
    criterion: str = ""
    signal: str = ""

    def failure(self, method: str) -> str:
        """When a method fails."""
        return self.fails if isinstance(self.fails, str) else self.fails[method]


NO_DATA = "where no row is wrong: worse than a random half"
HARD = "where rows are wrong: keeps the hard rows, and those are the wrong ones"
PAGES = (
    Page(
        "Resonance",
        ("resonance", "resonance_sgd", "resonance_l2"),
        "mean over the last 3 layers of mean |W_up - W_up'|, W_up' after a fresh AdamW step on that row alone; with "
        "`_sgd` after a plain step `lr * g`; with `_l2` the Frobenius norm in place of the mean",
        "ResoFilter, [arXiv 2412.14809](https://arxiv.org/abs/2412.14809)",
        "a causal language model; one forward, and a backward through the last layers",
        NO_DATA + "; with a model that cannot do the task: no better than chance",
        "On a model that knows little, the scores saturate ([saturation](../concepts.md#saturation)). Plain loss found "
        "the demo's wrong rows better than resonance did, on every seed, for one forward.",
        "resonance",
        "resonance",
    ),
    Page(
        "Resonance together with the loss, and beyond it",
        ("resonance_and_loss", "resonance_residual"),
        "`resonance_and_loss`: the mean of a row's ranks by resonance and by loss. `resonance_residual`: the ranks by "
        "resonance minus their least-squares fit to the ranks of loss and length",
        "this package (`selecting/combining.py`)",
        "the scores of resonance, which hold loss and length as well",
        {
            "resonance_and_loss": "as resonance: where no row is wrong, below all rows",
            "resonance_residual": "finds no wrong rows (AUROC .50)",
        },
        '`DataSelector(by=("score", "loss"))` and `DataSelector(by=("score", "loss", "num_tokens"), '
        'combine="residual")` decide in the same way from saved scores.',
    ),
    Page(
        "Loss and perplexity",
        ("low_loss", "high_loss", "perplexity"),
        "mean_t -ln p_t over the learnt tokens; perplexity is e to the power of it, and ranks rows alike",
        "negative log-likelihood",
        "one forward",
        {"low_loss": "where no row is wrong: below all rows", "high_loss": HARD, "perplexity": "as `low_loss`"},
        "`low_loss` keeps the smallest, `high_loss` the largest. With 20 % wrong rows, half by lowest loss was not "
        "certain to help.",
        "loss",
        "loss",
    ),
    Page(
        "Entropy",
        ("entropy",),
        "mean_t -sum_v p_v ln p_v, over the learnt tokens t and the vocabulary v",
        "predictive entropy",
        "one forward",
        "half by it was nowhere certain to be better than a random half",
        criterion="entropy",
        signal="entropy",
    ),
    Page(
        "EL2N",
        ("el2n",),
        "mean_t ||p - y_t||_2, y_t one-hot",
        "EL2N, [arXiv 2107.07075](https://arxiv.org/abs/2107.07075), definition 2.3",
        "one forward",
        HARD,
        "The paper averages it over early weights of several runs; here it is at the given weights.",
        "el2n",
        "el2n",
    ),
    Page(
        "GraNd",
        ("grand",),
        "||g||_2, g the gradient of the row's own loss over all trainable weights",
        "GraNd, [arXiv 2107.07075](https://arxiv.org/abs/2107.07075), definition 2.1",
        "one full backward for each row",
        HARD,
        "The signal `grand_head` is the part of the model's head alone, from the one forward.",
        "grand",
    ),
    Page(
        "IFD and Superfiltering",
        ("ifd", "superfiltering"),
        "loss(response | prompt) / loss(response alone); of 1 and more, 0",
        "IFD, [arXiv 2308.12032](https://arxiv.org/abs/2308.12032); Superfiltering, "
        "[arXiv 2402.00530](https://arxiv.org/abs/2402.00530), by a small model (`proxy_model`)",
        "two forwards, and a prompt in each row",
        "where rows are wrong: keeps them, and is near or below random rows at a quarter and a half",
        "The ratio of losses ranks similarly to that of perplexities, but not equally.",
        "ifd",
        "ifd",
    ),
    Page(
        "DONOD",
        ("donod",),
        "TOPSIS over ||W - lr G|| - ||W|| and lr ||G||, W the output layer and G the row's gradient of it",
        "DONOD, [arXiv 2504.14810](https://arxiv.org/abs/2504.14810)",
        "one forward; a head that is one linear map",
        "did harm with 40 % and with 20 % wrong rows, although it dropped more wrong than right ones",
        "The reason was not investigated.",
        "donod",
    ),
    Page(
        "k-center",
        ("k_center",),
        "the order in which rows are taken, each the farthest from all before it, by their mean last hidden states",
        "k-center, [arXiv 1708.00489](https://arxiv.org/abs/1708.00489), algorithm 1",
        "one forward, and N^2 distances",
        "with wrong rows: worse than a random half",
        criterion="k_center",
    ),
    Page(
        "Length",
        ("longest", "shortest"),
        "the number of learnt tokens",
        "a baseline",
        "no model",
        {
            "longest": "with 40 % wrong rows: worse than a random half",
            "shortest": "with 20 % wrong rows and without any: worse than a random half",
        },
        "Where a model cannot do the task, no selector found wrong solutions better than their length did. Most "
        "signals rank by length before they rank by anything else "
        "([what helps](../signals.md#selections-that-resist-length)).",
        "length",
    ),
    Page(
        "Response ratio",
        ("response_ratio",),
        "learnt tokens / all tokens",
        "a baseline",
        "no model; a prompt in each row",
        "with 40 % wrong rows: worse than a random half",
        criterion="response_ratio",
    ),
    Page(
        "Repetition",
        ("repetition",),
        "the share of trigrams of learnt tokens that occur earlier among them",
        "a baseline",
        "no model",
        "everywhere here: no better than a random half",
        criterion="repetition",
    ),
    Page(
        "Rarity",
        ("rarity",),
        "mean_t -ln f(t), f the frequency of a token among the learnt tokens of the dataset",
        "unigram cross-entropy, after figure 5 of ResoFilter, [arXiv 2412.14809](https://arxiv.org/abs/2412.14809)",
        "no model",
        "everywhere here: no better than a random half",
        criterion="rarity",
    ),
    Page(
        "SelectIT",
        ("selectit",),
        "mean(S) / (1 + 0.2 std(S)) over rating prompts, S = k' / (K - 1) sum_k |P(k') - P(k)|, k' the most likely of "
        "the ratings 1 to 5",
        "SelectIT, [arXiv 2402.16705](https://arxiv.org/abs/2402.16705), eq. 1-4",
        "three forwards; a model that can rate",
        "everywhere here: no better than a random half",
        "For one model; the paper also averages over models of several sizes. The prompts are not the paper's. In "
        "`resofilter compare` only.",
    ),
    Page(
        "Nuggets",
        ("nuggets",),
        "the share of validation rows whose answer becomes more likely with the row as an example before it",
        "Nuggets, [arXiv 2312.10302](https://arxiv.org/abs/2312.10302), eq. 1-3",
        "validation rows (`validation_dataset`), and two forwards for each of them",
        "where one example in the prompt helps the model with no validation row: every score is 0",
        "In `resofilter compare` only.",
    ),
    Page(
        "LESS",
        ("less",),
        "the cosine of the row's gradient, as Adam applies it, with those of validation rows, over a LoRA warm-up",
        "LESS, [arXiv 2402.04333](https://arxiv.org/abs/2402.04333), sections 3 and 4",
        "validation rows (`validation_dataset`), and a LoRA training",
        "certain to be better than random rows only when three quarters of the worse data are kept",
        "Five times the cost of the others here. In `resofilter compare` only.",
    ),
    Page(
        "InfoBatch",
        ("infobatch",),
        "of the rows below the mean loss, a random share is kept and weighs n / kept, drawn anew in every epoch",
        "InfoBatch, [arXiv 2303.04947](https://arxiv.org/abs/2303.04947)",
        "nothing beforehand: it decides inside the run",
        "with wrong rows: does what random rows do",
        "It loses nothing on 84 % of the rows where none is wrong. In Python: `SoftPruning` with `ResonanceCallback` "
        "([inside a run](../tasks/in_run.md)).",
    ),
    Page(
        "Token cleaning",
        ("token_fixed", "token_rho", "token_self_evolving"),
        "a token's loss under the base model minus its loss under a reference model; the highest are learnt",
        "Token Cleaning, [arXiv 2502.01968](https://arxiv.org/abs/2502.01968)",
        "a reference model, or a training in stages",
        "if the base knows the task, not the noise: ruined the model with wrong rows, cost 15 to 30 points with none",
        "`keep` is the share of the tokens. The reference must know the good tokens better than the base does, the bad "
        "ones no better ([token cleaning](../tasks/tokens.md)). Why it cost points without a wrong row is not known.",
    ),
    Page(
        "Baselines: all rows, random rows",
        ("full", "random"),
        "all rows; or a random share of them",
        "a baseline",
        "no model",
        {"full": "where many rows are wrong", "random": "where no row is wrong: below all rows"},
        "Where no row is wrong, nothing here was better than all rows. Every selector is compared with as many random "
        "rows; in Python, `RandomSelector`.",
    ),
)
LEFT_OUT = {"signal", "dynamics", "token_rule", "column"}  # have pages elsewhere, or are a column of the user's


def tables() -> dict[str, dict[str, list[str]]]:
    """The cells of each selector in RESULTS.md, by the heading of the table."""
    text = RESULTS.read_text()
    found = {}
    for heading in (*DATA, "Wrong solutions written by a language model"):
        section = text.split(f"\n### {heading}")[1].split("\n### ")[0].split("\n## ")[0]
        rows = re.findall(r"^\| (\w+) \| (.*) \|$", section, flags=re.MULTILINE)
        found[heading] = {
            name: [each.strip() for each in cells.split("|")] for name, cells in rows if name != "selector"
        }
    return found


def cost(name: str) -> str:
    """Of measuring a row, in forwards."""
    forwards = METHODS[name].forwards
    return COSTS[name] if callable(forwards) else f"{forwards:g}"


def end(name: str) -> str:
    """The end that goes first."""
    policy = METHODS[name].policy(0.5, 0, SelectorConfig("full"))
    if not isinstance(policy, DataSelector) or name == "full":
        return {"random": "at random", "full": "none", "infobatch": "below the mean, at random"}.get(name, "smallest")
    own = CRITERIA[METHODS[name].scores].drop if METHODS[name].scores in CRITERIA else ENDS.get(name, "largest")
    return policy.drop or own


def half(cells: dict[str, list[str]], name: str) -> str:
    """The half by a selector over a random half; a method with a share of its own has its accuracy beside theirs."""
    return cells[name][1].strip("()") if name in cells else UNMEASURED


def page_of(page: Page, measured: dict[str, dict[str, list[str]]]) -> str:
    """The text of a page."""
    lines = [f"# {page.title}", "", "| | |", "|---|---|", f"| formula | {cell(page.formula)} |"]
    lines += [f"| source | {page.source} |", f"| needs | {page.needs} |"]
    costs = dict.fromkeys(cost(name) for name in page.methods)
    each = len(costs) > 1
    lines += [f"| forwards for each row | {named(page, cost) if each else next(iter(costs))} |"]
    lines += [f"| dropped first | {named(page, end)} |", f"| fails | {named(page, page.failure)} |"]
    if page.criterion:
        extra = "" if page.criterion == "resonance" else f"`resofilter score --criterion {page.criterion}`"
        lines += [f"| command | {extra or '`resofilter score`'} |"]
    if page.signal:
        where = "in the same pass" if page.signal in SIGNALS else "with further forwards"
        lines += [f"| signal | `--signals {page.signal}`, {where}: {ALL_SIGNALS[page.signal].unit} |"]
    lines += [f"| in a comparison | {', '.join(f'`{name}`' for name in page.methods)} |", ""]
    lines += [page.note, ""] if page.note else []
    lines += measured_lines(page, measured)
    return "\n".join(lines).rstrip() + "\n"


def measured_lines(page: Page, measured: dict[str, dict[str, list[str]]]) -> list[str]:
    """What was measured of a page's methods, if anything."""
    rows = [row for name in page.methods if (row := measured_row(name, measured))]
    if not rows:
        return []
    said = "Half of the rows over a random half, with 95 % intervals over five seeds, and mean AUROC for the wrong rows"
    if any(" of 0." in row for row in rows):
        said += "; of what chooses its own share, the accuracy and that share"
    return [
        *("## Measured here", "", f"{said}:", ""),
        "| | 40 % wrong | 20 % wrong | no wrong row | AUROC, 40 % wrong | AUROC, language model's errors |",
        *("|---|---|---|---|---|---|", *rows, ""),
        "[Does it work?](../measured/RESULTS.md#does-it-work-2026-11-22); last column: one seed, intervals over rows.",
    ]


def cell(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|")


def named(page: Page, ask: Callable[[str], str]) -> str:
    """An answer for each method of a page; one if all have the same."""
    answers = {name: ask(name) for name in page.methods}
    if len(set(answers.values())) == 1:
        return next(iter(answers.values()))
    return "; ".join(f"`{name}`: {answer}" for name, answer in answers.items())


def measured_row(name: str, measured: dict[str, dict[str, list[str]]]) -> str:
    """The line of a method, or none."""
    if name not in measured[DATA[0]]:
        return ""
    halves = [half(measured[data], name) for data in DATA]
    errors = measured["Wrong solutions written by a language model"]
    found = measured[DATA[0]][name][4] or UNMEASURED
    return f"| `{name}` | {' | '.join(halves)} | {found} | {errors[name][0] if name in errors else UNMEASURED} |"


def table(measured: dict[str, dict[str, list[str]]]) -> str:
    """The table of `selectors.md`."""
    lines = [
        "| selector | forwards for each row | dropped first "
        "| half over a random half: 40 % wrong | 20 % | 0 % | fails |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for page in PAGES:
        for name in page.methods:
            halves = [half(measured[data], name) for data in DATA] if name in measured[DATA[0]] else [""] * 3
            link = f"[`{name}`](criteria/{page.methods[0]}.md)"
            lines += [f"| {link} | {cost(name)} | {end(name)} | {' | '.join(halves)} | {page.failure(name)} |"]
    return "\n".join(lines) + "\n"


def written() -> dict[Path, str]:
    """Every file that this script writes, and its text."""
    measured = tables()
    found = {DOCS / "criteria" / f"{page.methods[0]}.md": page_of(page, measured) for page in PAGES}
    path = DOCS / "selectors.md"
    before, rest = path.read_text().split(BEGIN)
    found[path] = before + BEGIN + table(measured) + END + rest.split(END)[1]
    return found


def main() -> None:
    """Write them."""
    for path, text in written().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
