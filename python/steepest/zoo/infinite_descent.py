"""The Method of Infinite Descent: where the gradient of a closed model's squared loss is 0, solved for the step.

    0 = grad L(theta + delta) = sum_k D^(k+1) L(theta) [delta^k] / k!,    L = mean (f - y)^2, all data, fp64

For closed models (`steepest.zoo.closed`) the series is summed, not cut off: its sum is the gradient at theta + delta,
evaluated as it stands. What solves the equation:

    a linear model           L is quadratic: one Newton step
    AION, one input          exponents from the pencil of Hankel matrices of y (`steepest.zoo.aion`), then Newton
    every other closed one   Newton from the model's parameters

Where AION is the last layer f is linear in c, so c(z) = argmin_c L is a least-squares problem and L(z, c(z)) a function
of z alone, with gradient L_z and Hessian L_zz - L_zc L_cc^-1 L_cz. On a grid x = x_0 + n h its gradient is polynomials
in exp(d h), d the step of z. Where y is that of k units, the roots of the pencil make it 0 in one step. Otherwise
Newton starts at these roots, with Hessians of the summed equations and steps within a radius; of several starts the
lowest is taken, and the answer carries its gradient and the sign of its least curvature.

Source: arXiv:2510.05489 (Batley and Saha). From its abstract, figure and summaries, which is what was at hand: the
equation for delta, solved with its series summed; AION, and closure as the condition; one step on a simple problem,
beside steepest descent and Newton-CG; inner iterations that find the roots. Derived here: c eliminated, the polynomials
in exp(d h), the pencil, Newton and its starts, the class of polynomial models, and the test of the root.

It is no optimizer: it has no norm and no minibatches, keeps all derivatives in memory (n by p and p by p numbers for p
free parameters) and takes O(p^3 + n p^2) a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacfwd

from .aion import AION, exponents, grid_spacing
from .closed import Call, Closure

TOLERANCE = 1e-12  # of a gradient's entries, each relative to what it is for a residual like y along its derivative
CONVERGED = 1e-8  # of the same: where rounding ended the steps before TOLERANCE, it is a root all the same
EXACT = 1e-10  # a residual of this part of y is rounding: no other root is lower
NEGLIGIBLE = 1e-7  # a parameter moves the output by this part of what its like do: what it does is rounding
LINEAR = -1
MOST_STEPS = 100


class Root(NamedTuple):
    """A point where the gradient is 0, as far as it was reached.

    delta: what to add to each free parameter, by name, fp64.   gradient_norm: Euclidean, of mean (f - y)^2 at theta +
    delta over the free parameters, in fp64; large where nothing converged.   iterations: steps tried from all starts.
    definite: True for a strict minimum, where the Hessian's least eigenvalue is positive beyond rounding; False where
    it is negative beyond rounding, a saddle; None where it is 0 to rounding, so that it does not tell, and where no
    root was reached.
    """

    delta: dict[str, Tensor]
    gradient_norm: float
    definite: bool | None
    iterations: int

    def apply(self, model: nn.Module) -> None:
        """Adds delta to the parameters of model, in their dtype."""
        with torch.no_grad():
            for name, step in self.delta.items():
                model.get_parameter(name).add_(step)


@torch.inference_mode(False)
@torch.enable_grad()
def infinite_descent(
    model: nn.Module, x: Tensor | tuple[Tensor, ...], y: Tensor, *, max_iterations: int = MOST_STEPS
) -> Root:
    """The step from the model's parameters to a root of the gradient of mean (model(x) - y)^2; changes nothing.

        root = steepest.infinite_descent(model, x, y)
        root.apply(model)

    model: closed in the parameters that require a gradient; the others may be a backbone of any kind that comes before.
    x: what the model takes, all of it (a tuple for several arguments); (n,) does for an AION of one input.   y: of the
    output's shape, (n,) or (n, 1) for either.   Whatever their dtype, fp64 is what is computed in.
    max_iterations: steps at most from each start, of which AION has some. A root that was not reached shows in
    gradient_norm, a saddle in definite.

    ValueError for a model that is not closed (it names the layer), a random one, no free parameters, shapes that do not
    match, numbers that are not finite or too few to determine an AION.
    """
    if max_iterations < 1:
        raise ValueError(f"max_iterations should be at least 1 but is: {max_iterations}")
    problem = _closed_problem(model, x, y)
    best, steps = None, 0
    for start, leapt in _starts(problem):
        try:
            reached = _newton(problem, start, max_iterations, leapt)
        except torch.linalg.LinAlgError:  # numbers so large that LAPACK does not end: nowhere to start
            continue
        steps += reached.steps
        if reached.finite and (best is None or reached.better_than(best)):
            best = reached
        if best is not None and problem.exact(best.loss):
            break
    if best is None:
        raise ValueError("the loss at the model's parameters is not finite: bring x, or AION's alpha, nearer to 0")
    slowest = _slowest(problem, best.theta)
    if not torch.equal(slowest, best.theta):
        best = _newton(problem, slowest, max_iterations, False)
        steps += best.steps
    delta = problem.by_name(best.theta - problem.start)
    definite = best.at.definite(problem.unit) if best.slope <= CONVERGED else None
    return Root(delta, float(best.at.gradient.norm()), definite, steps)


@dataclass(frozen=True)
class Derivatives:
    """gradient (p,) and hessian (p, p) of the loss; scale (p,), positive: rms of df/dtheta_i over the outputs.

    Where that is next to nothing, NEGLIGIBLE of the largest of the same kind, or 1.
    """

    gradient: Tensor
    hessian: Tensor
    scale: Tensor

    def definite(self, unit: float) -> bool | None:
        """The sign of the least eigenvalue, which rescaling of parameters leaves as it is; None where it is about 0."""
        scaled = self.scaled_hessian()
        if not torch.isfinite(scaled).all():
            return None
        values = torch.linalg.eigvalsh(scaled)
        least = float(values[0])
        return None if abs(least) <= max(_rounding(values), 10 * self.slope(unit)) else least > 0

    def scaled_hessian(self) -> Tensor:
        return self.hessian / self.scale / self.scale[:, None]

    def slope(self, unit: float) -> float:
        """The largest entry of the gradient, each relative to the most that a residual of rms `unit` could make it."""
        if not torch.isfinite(self.hessian).all():
            return float("inf")
        return float((self.gradient / self.scale).abs().max()) / (2 * unit)


@dataclass(frozen=True)
class Problem:
    """The loss of a closed module as a function of one fp64 vector, its free parameters.

    names: those of the free parameters in the user's model; keys: in the module.  kinds: (p,), equal for parameters of
    the same unit, and LINEAR for what the output is affine in, jointly.  unit: rms of y, of which residuals are a part;
    1 if y is 0.
    """

    module: nn.Module
    tensors: dict[str, Tensor]
    keys: tuple[str, ...]
    names: tuple[str, ...]
    arguments: tuple[Tensor, ...]
    y: Tensor
    start: Tensor
    kinds: Tensor
    unit: float

    @property
    def linear(self) -> Tensor:
        return self.kinds == LINEAR

    def parts(self, theta: Tensor) -> list[Tensor]:
        shapes = [self.tensors[key].shape for key in self.keys]
        return [part.reshape(shape) for part, shape in zip(theta.split([s.numel() for s in shapes]), shapes)]

    def by_name(self, theta: Tensor) -> dict[str, Tensor]:
        return {name: part.clone() for name, part in zip(self.names, self.parts(theta))}

    def outputs(self, theta: Tensor) -> Tensor:
        tensors = {**self.tensors, **dict(zip(self.keys, self.parts(theta)))}
        return functional_call(self.module, tensors, self.arguments).flatten()

    def residual(self, theta: Tensor) -> Tensor:
        return self.outputs(theta) - self.y

    def loss(self, theta: Tensor) -> float:
        return float(self.residual(theta).square().mean())

    def exact(self, loss: float) -> bool:
        return loss <= (EXACT * self.unit) ** 2

    def derivatives(self, theta: Tensor) -> Derivatives:
        r = self.residual(theta)
        jacobian = jacfwd(self.outputs)(theta)
        curved = jacobian.mT @ jacobian
        if not self.exact(float(r.square().mean())):  # of a residual that is rounding the curvature is, too
            second = hessian(lambda t: self.outputs(t) @ r)(theta)
            curved = curved + (second + second.mT) / 2
        scale = jacobian.square().mean(0).sqrt()
        for kind in self.kinds.unique():
            alike = self.kinds == kind
            scale = torch.where(alike, scale.clamp(min=float(scale[alike].max()) * NEGLIGIBLE), scale)
        return Derivatives(2 / len(r) * (jacobian.mT @ r), 2 / len(r) * curved, torch.where(scale > 1e-150, scale, 1))

    def eliminated(self, theta: Tensor) -> Tensor:
        """theta with its linear parameters at the minimum over them, the shortest step there; 0 for rounding."""
        if not self.linear.any():
            return theta
        into = torch.eye(len(theta), dtype=theta.dtype, device=theta.device)[:, self.linear]
        jacobian = jacfwd(lambda step: self.outputs(theta + into @ step))(torch.zeros_like(theta[self.linear]))
        if not torch.isfinite(jacobian).all():
            return theta
        scale = jacobian.square().mean(0).sqrt()
        scale = torch.where(scale > 0, scale, 1)
        for _ in range(2):  # once more for what the first rounds
            theta = theta - into @ (torch.linalg.pinv(jacobian / scale) @ self.residual(theta) / scale)
        part = theta[self.linear]
        return theta.masked_scatter(self.linear, torch.where((part * scale).abs() > 1e-14 * self.unit, part, 0))


@dataclass(frozen=True)
class Reached:
    """The end of the steps of one start."""

    theta: Tensor
    at: Derivatives
    loss: float
    slope: float
    steps: int

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.theta).all()) and self.loss < float("inf")

    def better_than(self, other: Reached) -> bool:
        """A root before what is none, then the one that is lower beyond rounding."""
        return (self.slope > CONVERGED, self.loss) < (other.slope > CONVERGED, other.loss * (1 - 1e-9))


# ---- the model ------------------------------------------------------------------------------------------------------


def _closed_problem(model: nn.Module, x: Tensor | tuple[Tensor, ...], y: Tensor) -> Problem:
    """The innermost module that has all free parameters, with what it is called with: a frozen backbone runs once."""
    free = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not free:
        raise ValueError("the model has no parameter that requires a gradient: there is nothing to solve for")
    for name, p in free.items():
        if p.is_complex() or not torch.isfinite(p.detach()).all():
            raise ValueError(f"free parameters should be real and finite, but {name!r} is not: {p.dtype}")
    for name, module in model.named_modules():
        if isinstance(module, (torch.jit.ScriptModule, nn.DataParallel)):
            raise ValueError(f"{type(module).__name__} at {name!r} is a wrapper: give the module that it was made from")
    arguments = _arguments(model, x)
    tensors = {name: _double(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    closure = Closure([tensors[name] for name in free], {module: name for name, module in model.named_modules()})
    with closure.watching():
        output = functional_call(model, tensors, arguments)
    if not isinstance(output, Tensor):
        raise ValueError(f"the model should return a tensor but returns: {type(output).__name__}")
    module, arguments = _innermost(closure.calls, set(map(id, free.values())), output) or (model, arguments)
    named = {id(p): name for name, p in free.items()}
    keys = tuple(key for key, p in module.named_parameters() if p.requires_grad)
    tensors = {key: _double(t) for key, t in [*module.named_parameters(), *module.named_buffers()]}
    names = tuple(named[id(module.get_parameter(key))] for key in keys)
    y = _targets(y, output)
    kinds = torch.cat([torch.full((tensors[key].numel(),), _kind(module, keys, key), device=y.device) for key in keys])
    _check_enough(module, arguments[0], y, len(kinds))
    start = torch.cat([tensors[key].flatten() for key in keys])
    return Problem(
        module=module,
        tensors=tensors,
        keys=keys,
        names=names,
        arguments=arguments,
        y=y,
        start=start,
        kinds=kinds,
        unit=float(y.square().mean().sqrt()) or 1.0,
    )


def _arguments(model: nn.Module, x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    arguments = x if isinstance(x, tuple) else (x,)
    for argument in arguments:
        if not isinstance(argument, Tensor):
            raise ValueError(f"x should be a tensor, or a tuple of tensors, but has: {type(argument).__name__}")
        if argument.is_complex():
            raise ValueError(f"x should be real but is: {argument.dtype}")
        if not torch.isfinite(argument).all():
            raise ValueError(f"x should be finite but {int((~torch.isfinite(argument)).sum())} of its entries are not")
    if isinstance(model, AION) and arguments[0].ndim == 1:
        arguments = (arguments[0][:, None],)
    return tuple(_double(argument) for argument in arguments)


def _targets(y: Tensor, output: Tensor) -> Tensor:
    if not isinstance(y, Tensor):
        raise ValueError(f"y should be a tensor but is: {type(y).__name__}")
    if y.is_complex() or output.is_complex():
        raise ValueError(f"y and the output should be real but are: {y.dtype} and {output.dtype}")
    shapes = [t.shape[:-1] if t.ndim > 1 and t.shape[-1] == 1 else t.shape for t in (y, output)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"y should have the output's shape {tuple(output.shape)} but has: {tuple(y.shape)}")
    if not y.numel():
        raise ValueError(f"there should be data but y has shape: {tuple(y.shape)}")
    if not torch.isfinite(y).all():
        raise ValueError(f"y should be finite but {int((~torch.isfinite(y)).sum())} of its entries are not")
    y = y.detach().to(torch.float64).flatten()
    size = float(y.square().mean())
    if y.any() and not 1e-200 < size < 1e200:
        raise ValueError(f"the squares of y should fit fp64 but their mean is {size:.0e}: rescale y")
    return y


def _double(tensor: Tensor) -> Tensor:
    """A copy, in fp64 if it is floating: what the forward pass changes are copies."""
    return tensor.detach().to(torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)


def _innermost(calls: list[Call], free: set[int], output: Tensor) -> tuple[nn.Module, tuple[Tensor, ...]] | None:
    """Calls are in the order in which they ended, so the first that will do is the innermost."""
    once = [call for call in calls if sum(other.module is call.module for other in calls) == 1]
    for call in once:
        if call.constant and call.output is output and free <= set(map(id, call.module.parameters())):
            return call.module, (call.argument,)  # type: ignore[return-value]
    return None


def _kind(module: nn.Module, keys: tuple[str, ...], key: str) -> int:
    """Parameters of one kind have one unit. LINEAR is AION's c: its exponents are the other kind there."""
    if type(module) is not AION:
        return keys.index(key)
    return LINEAR if key in ("cosine", "sine") else 0


def _check_enough(module: nn.Module, x: Tensor, y: Tensor, parameters: int) -> None:
    if type(module) is not AION:
        return
    numbers = len(torch.unique(x.reshape(-1, module.inputs), dim=0)) * module.outputs
    if numbers < parameters:
        raise ValueError(
            f"{numbers} values at different x do not determine {parameters} free parameters of {module}: "
            "give more, or take fewer units"
        )


# ---- where to start -------------------------------------------------------------------------------------------------


def _starts(problem: Problem) -> Iterator[tuple[Tensor, bool]]:
    """Parameters to start from, and whether they are a step from the model's; the model's are the last."""
    head = problem.module
    if type(head) is AION and head.inputs == 1 and {"alpha", "omega"} & set(problem.keys):
        least = head.units * (1 + ("omega" in problem.keys))
        x, y = problem.arguments[0].reshape(-1), problem.y.reshape(-1, head.outputs)
        orders = (least, 2 * least, 3 * least, head.units)  # in noise, more poles tell the units from it
        for guess in exponents(x, y, orders):
            z = _strongest(guess, x, y, head.units)
            yield _with_exponents(problem, z), True
            if "omega" in problem.keys and bool((z.imag == 0).any()):  # where nothing depends on omega to first order
                slow = torch.complex(z.real, torch.where(z.imag == 0, 1 / (x.max() - x.min()), z.imag))
                yield _with_exponents(problem, slow), True
    yield problem.start, False


def _strongest(z: Tensor, x: Tensor, y: Tensor, units: int) -> Tensor:
    """The exponents, `units` at most, whose parts of the least-squares fit are the largest."""
    waves = (z * x[:, None]).exp()
    if len(z) <= units or not torch.isfinite(waves).all():
        return z[:units]
    columns = torch.cat([waves.real, waves.imag], 1)
    parts = (torch.linalg.pinv(columns) @ y).square().sum(1) * columns.square().sum(0)
    return z[parts.reshape(2, -1).sum(0).topk(units).indices]


def _with_exponents(problem: Problem, z: Tensor) -> Tensor:
    """The model's parameters with alpha and omega of z, each with the unit nearest to it; others keep theirs."""
    parts = dict(zip(problem.keys, problem.parts(problem.start.clone())))
    alpha, omega = (parts.get(key, problem.tensors[key]).flatten() for key in ("alpha", "omega"))
    left = list(range(len(alpha)))
    for value in z:
        signed = torch.where(omega[left] < 0, value.conj(), value)
        unit = left.pop(int((torch.complex(alpha[left], omega[left]) - signed).abs().argmin()))
        alpha[unit], omega[unit] = value.real, value.imag.copysign(omega[unit])
    return torch.cat([part.flatten() for part in parts.values()])


def _slowest(problem: Problem, theta: Tensor) -> Tensor:
    """theta with every omega between -pi / h and pi / h: on a grid a faster wave has the values of one of these."""
    head = problem.module
    if type(head) is not AION or head.inputs > 1 or "omega" not in problem.keys:
        return theta
    spacing = grid_spacing(problem.arguments[0])
    if spacing is None:
        return theta
    parts, turn = dict(zip(problem.keys, problem.parts(theta))), 2 * math.pi / spacing
    fast = parts["omega"].abs() > turn / 2 * (1 + 1e-9)
    parts["omega"] = torch.where(fast, torch.remainder(parts["omega"] + turn / 2, turn) - turn / 2, parts["omega"])
    return torch.cat([part.flatten() for part in parts.values()])


# ---- Newton ---------------------------------------------------------------------------------------------------------


def _newton(problem: Problem, start: Tensor, most: int, leapt: bool) -> Reached:
    """A root below `start`, reached by steps within a radius; `leapt`: coming to start was a step already."""
    theta, loss, at, unit = start, problem.loss(start), problem.derivatives(start), problem.unit
    steps, moves, radius = int(leapt), ~problem.linear, float("inf")
    if problem.linear.any() and not at.slope(unit) <= TOLERANCE:
        theta = problem.eliminated(start)
        loss, at, steps = problem.loss(theta), problem.derivatives(theta), 1
    while TOLERANCE < at.slope(unit) < float("inf") and steps < most and moves.any():
        gradient, curvature = _reduced(at, problem.linear)
        if not torch.isfinite(curvature).all():
            break
        step, inside = _step(curvature, gradient, radius, unit)
        predicted = -float(step @ (gradient + curvature @ step / 2))
        trial = theta.clone()
        trial[moves] += step / at.scale[moves]
        trial = problem.eliminated(trial)
        lower, length, rounding = problem.loss(trial), float(step.norm()), predicted <= 1e-13 * loss
        steps += 1
        after = problem.derivatives(trial) if rounding or lower <= loss - 1e-4 * predicted else None
        if rounding and not (after is not None and after.slope(unit) < at.slope(unit)):
            break
        if after is None or not after.slope(unit) < float("inf"):
            radius = length / 4
            if length <= 1e-15 * unit:
                break
            continue
        if not inside and loss - lower > 0.75 * predicted:
            radius = 2 * length
        elif not rounding and loss - lower < 0.25 * predicted:
            radius = length / 2
        theta, loss, at = trial, lower, after
    return Reached(theta, at, loss, at.slope(unit), steps)


def _reduced(at: Derivatives, linear: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian, in units of the scale, of the loss as a function of what is not linear."""
    gradient, full = at.gradient / at.scale, at.scaled_hessian()
    if not linear.any():
        return gradient, full
    z, c = ~linear, linear
    back = full[z][:, c] @ torch.linalg.pinv(full[c][:, c], hermitian=True)
    return gradient[z] - back @ gradient[c], full[z][:, z] - back @ full[c][:, z]


def _step(curvature: Tensor, gradient: Tensor, radius: float, unit: float) -> tuple[Tensor, bool]:
    """The lowest point within the radius of a quadratic function, and whether it is inside: then it is Newton's.

    Where the curvature is 0, and the gradient along it too, nothing moves.
    """
    values, vectors = torch.linalg.eigh((curvature + curvature.mT) / 2)
    along, rounding = vectors.mT @ gradient, _rounding(values)
    size = float(along.norm())
    # Along a valley the curvature is as small as the gradient across it, and of either sign.
    for least, share in ((rounding, 1e-10), (max(rounding, 10 * size / unit), 0.1)):
        flat = values.abs() <= least
        if bool((values[~flat] > 0).all()) and float(along[flat].norm()) <= share * size:
            newton = torch.where(flat, 0, -along / torch.where(flat, 1, values))
            if float(newton.norm()) <= radius:
                return vectors @ newton, True
    radius = radius if radius < float("inf") else unit
    low = max(0.0, -float(values[0])) + rounding
    high = low + size / radius
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float((along / (values + middle)).norm()) > radius else (low, middle)
    step = -along / (values + high)
    rest = radius**2 - float(step.square().sum())
    if float(values[0]) < -rounding and rest > (1e-3 * radius) ** 2:  # no gradient along the most negative curvature
        step[0] += rest**0.5
    return vectors @ step, False


def _rounding(values: Tensor) -> float:
    """What eigenvalues may err by."""
    return 4e-15 * len(values) * float(values.abs().max())
