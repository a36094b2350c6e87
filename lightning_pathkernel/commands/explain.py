"""`pathkernel explain`: which training examples speak for and against predictions, and the ledger of each."""

from __future__ import annotations

from typing import Any

from lightning_pathkernel import store
from lightning_pathkernel.commands.answer import answer, told
from lightning_pathkernel.commands.inputs import load_machine, read_inputs, read_targets
from lightning_pathkernel.explanation import Explanation
from lightning_pathkernel.machine import KernelMachine

__all__ = ["explain"]


def explain(
    directory: str,
    inputs: str,
    *,
    module: str,
    module_args: dict[str, Any] | None = None,
    forward_fn: str | None = None,
    device: str | None = None,
    target: int | list[int] | None = None,
    top_k: int = 5,
    json: bool = False,
) -> int:
    """Name the training examples behind predictions.

    Those most for and most against each, and its ledger: where all of the output came from.

    Args:
        directory: The machine: its directory, or an fsspec URL.
        inputs: One row per input: .npy, .safetensors or .csv.
        module: Makes the network: `package.Class` or a function.
        module_args: Arguments for it, as JSON: '{"hidden": 32}'.
        forward_fn: `package.function` given in training, if any.
        device: Where the network runs, such as cuda; default: cpu.
        target: Output to explain; default: the predicted class.
        top_k: Examples for and examples against; default: 5.
        json: Print one line of JSON.

    Returns:
        The exit status: 0, or 1 if the artifact is damaged or of another module.

    Raises:
        ValueError: If an argument is out of range.
    """
    if top_k < 1:
        raise ValueError(f"--top-k must be at least 1, found {top_k}")
    try:
        machine, network = load_machine(directory, module, module_args, forward_fn, device)
        x = read_inputs(inputs, network)
        why = machine.explain(x, target=read_targets(target, len(x)), top_k=top_k)
        found = [_query(machine, why, i) for i in range(len(x))]
    except store.ArtifactError as error:
        return answer({"ok": False, "error": str(error)}, told(directory, error), json, status=1)
    return answer({"ok": True, "queries": found}, "\n\n".join(map(_told, found)), json)


def _query(machine: KernelMachine, why: Explanation, i: int) -> dict[str, Any]:
    names = machine.names_of(why.example_ids[i])
    shares = [
        {"id": int(example), "name": str(name), "contribution": float(share)}
        for example, name, share in zip(why.example_ids[i], names, why.contributions[i], strict=True)
    ]
    half = len(shares) // 2
    return {
        "query": i,
        "target": int(why.target[i]),
        "prediction": float(why.prediction[i]),
        "network": float(why.network[i]),
        "ledger": {term: float(value[i]) for term, value in why.ledger.items()},
        "for": shares[:half],
        "against": shares[half:],
    }


def _told(query: dict[str, Any]) -> str:
    told = f"machine {query['prediction']:.6g}, network {query['network']:.6g}, which is the sum of"
    lines = [f"query {query['query']}, output {query['target']}: {told}"]
    lines += [f"  {term:14}{value:+.6g}" for term, value in query["ledger"].items()]
    for side in ("for", "against"):
        lines += [f"  {side:14}{share['contribution']:+.6g}  {share['name']}" for share in query[side]]
    return "\n".join(lines)
