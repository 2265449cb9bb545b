"""Solvers of the transport problem of Eq. 15 by name: the library's own and those of POT. Axes: `B` batch."""

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ask_lightning.functional.transport import sinkhorn_plan
from ask_lightning.utilities.dtypes import computation_dtype
from ask_lightning.utilities.optional_imports import import_optional

SINKHORN = "sinkhorn"
"""The name of the library's own solver."""

_POT = "pot:"
_MODULES = ("bregman", "unbalanced", "partial", "lp", "smooth")
_PROBLEM = ("a", "b", "M")  # the first parameters of POT's solvers: both marginals and the cost


class TransportSolver(Protocol):
    """Finds a transport plan between the texts and the audios of a batch."""

    def __call__(
        self, similarity: Tensor, epsilon: float, iterations: int, *, bounded: bool = True
    ) -> Tensor:
        """Solve the problem.

        Args:
            similarity: `(..., B, B)`, rows text, columns audio; leading axes hold problems of their own.
            epsilon: ε > 0, the weight of the entropy.
            iterations: Largest number of iterations.
            bounded: Whether all similarities lie in [-1, 1].

        Returns:
            `(..., B, B)`, non-negative, each matrix of total mass at most 1.
        """
        ...


def find_transport_solver(name: str) -> TransportSolver:
    """Find a solver by name.

    Args:
        name: `"sinkhorn"` for `sinkhorn_plan`, or the name of a function of POT that returns a plan, with
            further parameters behind semicolons: `"pot:sinkhorn_log"`, `"pot:emd"`,
            `"pot:sinkhorn_unbalanced;reg_m=1.0"`, `"pot:entropic_partial_wasserstein;m=0.9"`.

    Returns:
        The solver.

    Raises:
        ValueError: There is no such solver, or POT refuses the parameters.
        ImportError: The solver is one of POT, which is not installed.

    Examples:
        >>> find_transport_solver("pot:emd")(torch.eye(2), 0.1, 50)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    if name == SINKHORN:
        return sinkhorn_plan
    if not isinstance(name, str) or not name.startswith(_POT):
        raise ValueError(
            'Argument `transport_solver` has to be "sinkhorn" or the name of a solver of POT such as '
            f'"pot:sinkhorn_log" or "pot:sinkhorn_unbalanced;reg_m=1.0", but got {name!r}.'
        )
    function, *settings = name.removeprefix(_POT).split(";")
    return PotSolver(function, tuple(_parse(setting, name) for setting in settings))


@dataclass(frozen=True)
class PotSolver:
    """A solver of POT (Flamary et al., JMLR 22, 2021), run in float64 on the CPU, without gradient.

    The cost is `1 - S` and both marginals are uniform, as in Eq. 15. ε is POT's `reg`, where the solver has
    one; the number of iterations is `numItermax` of the solvers named after Sinkhorn, and all others stop by
    POT's own defaults. Balanced solvers return the plan of the paper's problem; unbalanced and partial ones
    leave out mass where a pair resembles nothing.

    Args:
        function: Name of a function of `ot.bregman`, `ot.unbalanced`, `ot.partial`, `ot.lp` or `ot.smooth`.
        parameters: Pairs of the names and the values of further parameters of the function.

    Raises:
        ValueError: There is no such function, or it cannot be called with these parameters.
        ImportError: POT is not installed.
    """

    function: str
    parameters: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        accepted = inspect.signature(self._function()).parameters
        allowed = {
            name: parameter
            for name, parameter in accepted.items()
            if name not in (*_PROBLEM, "reg") and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        }
        needed = [name for name, parameter in allowed.items() if parameter.default is parameter.empty]
        given = dict(self.parameters)
        if not set(needed) <= set(given) <= set(allowed):
            raise ValueError(
                f"Argument `transport_solver` has to give POT's `{self.function}` parameters out of "
                f"{list(allowed)}, of which it needs {needed}, but got {given}. Write each as "
                f'`;name=value` behind "pot:{self.function}"; its `reg` is `sinkhorn_epsilon`.'
            )
        self._try_out()

    def __call__(
        self, similarity: Tensor, epsilon: float, iterations: int, *, bounded: bool = True
    ) -> Tensor:
        """Solve the problem, see `TransportSolver`.

        Raises:
            RuntimeError: The plan holds NaN or Inf.
        """
        cost = 1 - similarity.detach().cpu().double().numpy()  # (..., B, B)
        problems = cost.reshape(-1, *cost.shape[-2:])
        plan = np.stack([self._solve(problem, epsilon, iterations) for problem in problems])
        if not np.isfinite(plan).all():
            raise RuntimeError(
                f"POT's `{self.function}` returned a plan with NaN or Inf for an ε of {epsilon}. Raise "
                '`sinkhorn_epsilon`, or take a solver on logarithms such as "pot:sinkhorn_log".'
            )
        plans = torch.as_tensor(plan).reshape(similarity.shape)
        return plans.to(similarity.device, computation_dtype(similarity))

    def _solve(self, cost: Any, epsilon: float, iterations: int) -> Any:
        """The plan `(B, B)` of a cost `(B, B)`, in NumPy."""
        function = self._function()
        accepted = inspect.signature(function).parameters
        arguments: dict[str, Any] = {"reg": epsilon, "warn": False}
        if "sinkhorn" in self.function:
            arguments["numItermax"] = iterations
        arguments = {name: value for name, value in arguments.items() if name in accepted}
        marginal = np.full(len(cost), 1 / len(cost))
        return function(marginal, marginal, cost, **arguments | dict(self.parameters))

    def _function(self) -> Callable[..., Any]:
        """The function of POT."""
        solvers = _pot_solvers()
        if self.function not in solvers:
            raise ValueError(
                f"Argument `transport_solver` has to name one of POT's solvers {sorted(solvers)}, but got "
                f"{self.function!r}."
            )
        return solvers[self.function]

    def _try_out(self) -> None:
        """Solve a problem of two pairs, so that what cannot work fails before training."""
        try:
            plan = self._solve(1 - np.eye(2), 0.5, 10)
        except Exception as error:
            raise ValueError(
                f"Argument `transport_solver` has to suit POT, whose `{self.function}` failed with "
                f"{dict(self.parameters)}: {error}"
            ) from error
        if not isinstance(plan, np.ndarray):
            raise ValueError(
                f"Argument `transport_solver` has to let POT's `{self.function}` return a plan alone, but "
                f"with {dict(self.parameters)} it returns a {type(plan).__name__}. Leave `log` out."
            )


@cache
def _pot_solvers() -> dict[str, Callable[..., Any]]:
    """All functions of POT that make a plan of two marginals and a cost, by name."""
    import_optional("ot")
    return {
        name: function
        for module in _MODULES
        for name, function in vars(import_optional(f"ot.{module}")).items()
        if inspect.isfunction(function)
        and not name.endswith("2")  # those return the cost of the plan
        and tuple(inspect.signature(function).parameters)[: len(_PROBLEM)] == _PROBLEM
    }


def _parse(setting: str, name: str) -> tuple[str, Any]:
    """The name and the value of `"parameter=value"`; what is no literal is a string."""
    parameter, equals, value = setting.partition("=")
    if not (parameter and equals and value):
        raise ValueError(
            "Argument `transport_solver` has to give parameters as name=value behind semicolons, but got "
            f"{setting!r} in {name!r}."
        )
    try:
        return parameter, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return parameter, value
