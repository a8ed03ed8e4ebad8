"""Which recipes the fused ops have, and as which program.

What the ops leave to torch operations (`eager`), and what they would need for it:

    no momentum          OrthogonalSGDM, whose momentum is of updates        items without a momentum
    reads_weight         TrustRegion(composite="ridge")                      the weight in the direction's input
    interpolated         a recipe that divides Lion's momentum by D          a bound of the direction's input
    decay not `fused`    Fromage                                             norms of weight and update before the step
"""

from __future__ import annotations

from dataclasses import replace

from ..ops.program import Power, Program
from ..parts import Diagonal, Direction, Frobenius, Identity, Sign
from ..parts.product_norm import Box
from ..recipe import Recipe

__all__ = ["is_elementwise", "program"]

_POWERS: dict[float, Power] = {0.25: "quarter", 0.5: "half", 1 / 6: "sixth"}


def program(recipe: Recipe, *, maximize: bool = False, coupled: bool = False) -> Program | str:
    """The recipe as the fused ops take it, or the reason why they do not.

    coupled: layers wait for one another, so that no op may take the whole step. With Kronecker factors or transforms of
    the update the program is of what lies around those: momentum before, decay and rounding after. Transforms come
    after the division by D, and then it is theirs too, with the second moment. Momentum that is damped where a step has
    been taken by it is a heavy ball with beta1 = 1, which `Fused` gives it, and is damped when the updates are made.
    """
    momentum, precondition = recipe.momentum, recipe.precondition
    if momentum is None:
        return "the direction is asked about gradients, and there is no momentum of them"
    if momentum.interpolated and not isinstance(precondition, Identity):
        return "what the momentum reads has a rate of its own, and a preconditioner divides it"
    if recipe.reads_weight:
        return "the direction depends on the weight itself"
    if not recipe.decay.fused:
        return f"{type(recipe.decay).__name__} is not a formula of the fused ops"
    around = Program(
        heavy_ball=momentum.kind != "ema",
        nesterov=momentum.nesterov or momentum.interpolated,
        interpolated=momentum.interpolated,
        momentum_correction=momentum.bias_correction,
        cautious=recipe.decay.cautious,
        rounding=recipe.rounding.mode,
        maximize=maximize and not recipe.corrects_gradient,  # or it has been turned round before
        start_first=momentum.start == "first",
        decay_after=recipe.decay.after,
        decay_scaled=recipe.decay.scaled and recipe.decay.method == "decoupled",
        decay_independent=recipe.decay.method == "independent",
    )
    if recipe.by_matrix:
        return around
    if isinstance(precondition, Diagonal):
        power = _POWERS.get(precondition.power)
        if power is None:
            return f"the preconditioner's power is {precondition.power}; the kernels have 1/4, 1/2 and 1/6"
        around = replace(
            around,
            power=power,
            sum=precondition.average == "sum",
            second_correction=precondition.bias_correction,
            eps_inside=precondition.eps_inside,
        )
    elif not isinstance(precondition, Identity):
        return f"the preconditioner {type(precondition).__name__} is not elementwise"
    # A ratio of the learning rate belongs to a matrix' shape, which the program of a whole parameter does not know.
    if coupled or recipe.adjust_lr != "none" or recipe.decay.scaled:
        return around
    if _is_identity(recipe.direction, recipe.scale):
        return replace(around, direction="identity")
    return replace(around, direction="sign") if _is_sign(recipe.direction, recipe.scale) else around


def is_elementwise(recipe: Recipe) -> bool:
    """Whether a number of the update depends on nothing but that number of the gradient and of the state."""
    return not recipe.by_matrix and (
        _is_identity(recipe.direction, recipe.scale) or _is_sign(recipe.direction, recipe.scale)
    )


def _is_identity(direction: Direction, scale: str) -> bool:
    """Whether the step is the direction's input itself."""
    return (direction, scale) in ((Frobenius(), "dual"), (Box(), "lmo"))


def _is_sign(direction: Direction, scale: str) -> bool:
    return (direction, scale) == (Sign(), "lmo")
