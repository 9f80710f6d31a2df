"""Draw docs/taggers.svg: mAP of published AudioSet taggers against parameters and multiply-adds for ten seconds.

Run as `python -m scripts.draw_taggers`. Other taggers' figures are as published; nothing was measured again. What CED
computes is counted from its networks.
"""

from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes

from ced.model.config import ModelConfig
from ced.model.zoo import MODELS
from ced.sound.features import PATCH
from scripts.drawing import figure

OUT = Path(__file__).parents[1] / "docs" / "taggers.svg"
FRAMES = 1001  # ten seconds


@dataclass(frozen=True)
class Tagger:
    """A published tagger."""

    name: str
    parameters: float  # millions
    multiply_adds: float  # billions, for ten seconds
    map: float  # on AudioSet's evaluation set, percent
    place: tuple[float, float] = (6, -4)  # of its name, points from its dot


OTHERS = (
    Tagger("mn04", 0.98, 0.11, 43.2),
    Tagger("mn10", 4.9, 0.54, 47.1),
    Tagger("dymn10", 10.6, 0.58, 47.7),
    Tagger("dymn20", 40, 2.2, 49.1, (-6, -9)),
    Tagger("AST", 86, 100, 45.9),
    Tagger("PaSST", 86, 100, 47.4),  # 47.1 to 47.6
    Tagger("BEATs", 90, 45, 48.6),
    Tagger("EAT", 88, 43.7, 48.9),
    Tagger("SSLAM", 88, 43.7, 50.2, (6, 0)),
)


def multiply_adds(config: ModelConfig) -> float:
    """Count what a network computes for ten seconds, in billions, with the products of attention."""
    width, tokens = config.embed_dim, FRAMES // PATCH * config.n_mels // PATCH
    layers = (4 + 2 * config.mlp_ratio) * width**2 * tokens  # query, key, value, projection; the two of the MLP
    attention = 2 * tokens**2 * width
    return (config.depth * (layers + attention) + PATCH**2 * width * tokens) / 1e9


def ours() -> list[Tagger]:
    """Return the four sizes of CED."""
    found = []
    for entry in MODELS.values():
        if entry.name.startswith("ced_") and entry.map is not None:
            config = ModelConfig(embed_dim=entry.width, num_heads=entry.heads)
            found.append(Tagger(entry.name.replace("_", "-"), entry.params, multiply_adds(config), entry.map, (-3, 8)))
    return found


def draw(axes: Axes, what: str, label: str) -> None:
    """Draw all taggers against one of their costs."""
    family = ours()
    axes.plot([getattr(one, what) for one in family], [one.map for one in family], "o-", color="tab:orange", zorder=3)
    axes.plot([getattr(one, what) for one in OTHERS], [one.map for one in OTHERS], "o", color="tab:grey")
    for one in (*family, *OTHERS):
        colour, weight = ("tab:orange", "bold") if one in family else ("dimgrey", "normal")
        at = getattr(one, what), one.map
        side = "right" if one.place[0] < 0 else "left"
        axes.annotate(
            one.name, at, one.place, textcoords="offset points", ha=side, color=colour, weight=weight, fontsize=8
        )
    axes.set_xscale("log")
    axes.set_xlim(right=300)  # room for names
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)


def main() -> None:
    """Draw the picture."""
    with figure(OUT, 10, 4, columns=2, share="y") as (left, right):
        draw(left, "parameters", "parameters, millions")
        draw(right, "multiply_adds", "multiply-adds for ten seconds, billions (AST, PaSST: about)")
        left.set_ylabel("mAP on AudioSet, percent")


if __name__ == "__main__":
    main()
