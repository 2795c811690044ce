"""Who decides what happens at a cut: chance, by a seed, or a script of decisions made before."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.recovery.explorer.faults import FAULTS

if TYPE_CHECKING:
    from tests.recovery.explorer.world import Actor, World


# Most cuts are those of schedulers with nothing to do: this much more often, faults strike where rows are worked on.
CHILDREN = 4


@dataclass(frozen=True)
class Decision:
    """What happens at one cut of one actor. It means the same in every trace that has such a cut."""

    actor: str
    cut: int
    fault: str
    argument: tuple[Any, ...]
    # For the reader.
    what: str = field(default="", compare=False)

    def __str__(self) -> str:
        arguments = ", ".join(map(repr, self.argument))
        return f"{self.actor} at its cut {self.cut}, before {self.what}: {self.fault}({arguments})"

    def strike(self, world: World, actor: Actor) -> str | None:
        return FAULTS[self.fault].strike(world, actor, *self.argument)


class Chooser:
    """Decides by chance. The same seed decides the same.

    Each schedule knows some of the faults only, and has rates of its own: what needs many of one kind is found by those
    that have nothing else. With `only`, it is these that it knows.
    """

    def __init__(self, seed: int, only: Sequence[str] = ()) -> None:
        self.chance = random.Random(seed)
        self.made: list[Decision] = []
        self.cuts = self.chance.choice([250, 500, 900])
        self.rows = self.chance.choice([2, 4, 8])
        self.turns = self.chance.choice([0.0, 0.02, 0.1, 0.3])
        self.rate = self.chance.choice([0.01, 0.03, 0.08])
        self.weights = {name: fault.weight * self.chance.choice([0, 1, 1, 4]) for name, fault in FAULTS.items()}
        if only:
            self.weights = {name: float(name in only) for name in FAULTS}

    def at(self, actor: Actor, kind: str, what: str) -> Decision | None:
        world = actor.world
        if self.rows:
            self.rows -= 1
            name = "create"
        elif self.chance.random() < self.turns:
            name = "turn"
        elif self.chance.random() < self.rate * (CHILDREN if actor.process.kind == "child" else 1):
            possible = [name for name, fault in FAULTS.items() if fault.at in (None, kind)]
            weights = [self.weights[name] for name in possible]
            if not any(weights):
                return None
            name = self.chance.choices(possible, weights)[0]
        else:
            return None
        argument = FAULTS[name].draw(self.chance)
        decision = Decision(actor.name, actor.cuts, name, argument, what)
        self.made.append(decision)
        assert not world.is_calm
        return decision


class Script:
    """Decides what was decided before, where there is such a cut."""

    def __init__(self, decisions: list[Decision], cuts: int) -> None:
        self.cuts = cuts
        self.made: list[Decision] = []
        self._at = {(each.actor, each.cut): each for each in decisions}

    def at(self, actor: Actor, kind: str, what: str) -> Decision | None:
        decision = self._at.get((actor.name, actor.cuts))
        if decision is not None:
            self.made.append(decision)
        return decision
