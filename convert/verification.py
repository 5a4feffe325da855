"""`verify`: two checkpoints compared, parameter by parameter and output by output."""

import importlib.util
import math
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import zamba2_jax
from zamba2_jax.checkpoint import load_pretrained, open_parameters
from zamba2_jax.checkpoint.files import is_orbax
from zamba2_jax.checkpoint.progress import byte_bar

_BLOCK = 1 << 22


def verify(
    a: Path,
    b: Path,
    *,
    tolerance: float,
    logits_tolerance: float,
    run_models: bool,
    layers: bool,
    prompt_ids: list[int] | None,
    progress: bool | None,
) -> int:
    """Prints the differences between the checkpoints `a` and `b`; returns 1 if one exceeds its tolerance, else 0."""
    passed, architecture, vocab_size = _verify_parameters(a, b, tolerance, progress)
    if prompt_ids is None:
        prompt_ids = np.random.default_rng(0).integers(0, vocab_size, 32).tolist()
    elif max(prompt_ids) >= vocab_size:
        raise ValueError(f"--prompt-ids holds {max(prompt_ids)}, but the vocabulary ends at {vocab_size - 1}.")

    hugging_face, other = (b, a) if is_orbax(a) else (a, b)
    if not run_models or is_orbax(hugging_face):
        if run_models:
            print("outputs: not compared, for PyTorch neither side is Hugging Face's")
    elif importlib.util.find_spec("torch") is None:
        print("outputs: not compared, torch is not installed")
    else:
        passed &= _verify_outputs(hugging_face, other, architecture, prompt_ids, layers, logits_tolerance, progress)
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


@dataclass
class _Difference:
    count: int = 0
    differing: list[tuple[float, str]] = field(default_factory=list)

    def add(self, name: str, one: np.ndarray, other: np.ndarray) -> None:
        self.count += 1
        largest = largest_difference(one, other)
        if largest:
            self.differing.append((largest, name))

    @property
    def largest(self) -> float:
        return max((value for value, _ in self.differing), default=0.0)


def largest_difference(one: np.ndarray, other: np.ndarray) -> float:
    """The largest absolute difference in float64; 0 where both are NaN, infinite where only one is."""
    one, other = np.ravel(one), np.ravel(other)
    largest = 0.0
    for start in range(0, one.size, _BLOCK):
        x = one[start : start + _BLOCK].astype(np.float64)
        y = other[start : start + _BLOCK].astype(np.float64)
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        with np.errstate(invalid="ignore"):
            difference = np.where(same, 0.0, np.abs(x - y))
        largest = max(largest, math.inf if np.isnan(difference).any() else float(difference.max(initial=0.0)))
    return largest


def _verify_parameters(a: Path, b: Path, tolerance: float, progress: bool | None) -> tuple[bool, str, int]:
    one, other = open_parameters(a), open_parameters(b)
    if one.architecture != other.architecture:
        raise ValueError(f"{a} is a {one.architecture}, but {b} is a {other.architecture}.")
    shapes, other_shapes = ({path: p.shape(path) for path in p.paths()} for p in (one, other))
    if shapes != other_shapes:
        differing = sorted({".".join(map(str, path)) for path, _ in shapes.items() ^ other_shapes.items()})
        shown = ", ".join(differing[:5]) + (f" and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise ValueError(f"{a} and {b} are models of different shapes: {shown}.")

    result = _Difference()
    total = sum(math.prod(shape) for shape in shapes.values())
    with byte_bar("Comparing parameters", total, progress) as bar:
        for path in shapes:
            result.add(".".join(map(str, path)), one.read(path), other.read(path))
            bar.update(math.prod(shapes[path]))
    print(
        f"parameters: {result.count} compared, {len(result.differing)} differ, largest difference {result.largest:.6g}"
    )
    for value, name in sorted(result.differing, reverse=True)[:10]:
        print(f"  {value:.6g}  {name}")
    return result.largest <= tolerance, one.architecture, one.config.vocab_size


def _verify_outputs(
    hugging_face: Path,
    other: Path,
    architecture: str,
    prompt_ids: list[int],
    layers: bool,
    tolerance: float,
    progress: bool | None,
) -> bool:
    theirs = _run_torch(hugging_face, architecture, prompt_ids)
    model = load_pretrained(getattr(zamba2_jax, architecture), other, dtype=jnp.float32, progress=progress)
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids, output_hidden_states=True))
    output = run(state, jnp.asarray([prompt_ids]))
    ours = {f"hidden state {index}": np.asarray(value) for index, value in enumerate(output.hidden_states)}
    if architecture != "Zamba2Model":
        ours["logits"] = np.asarray(output.logits)
    names = list(ours) if layers else [list(ours)[-1]]

    print(f"outputs: PyTorch on {hugging_face}, zamba2_jax on {other}, float32, {len(prompt_ids)} tokens")
    largest = 0.0
    for name in names:
        difference = largest_difference(theirs[name], ours[name])
        largest = max(largest, difference)
        scale = float(np.abs(theirs[name]).max())
        print(f"  {name:18s} largest difference {difference:.3g}, largest value {scale:.3g}")
    return largest <= tolerance


def _run_torch(directory: Path, architecture: str, prompt_ids: list[int]) -> dict[str, np.ndarray]:
    """PyTorch's embedding, output of every layer but the last, final norm, and logits, by the names of ours."""
    import torch
    import transformers

    model = getattr(transformers, architecture).from_pretrained(directory, dtype=torch.float32).eval()
    config = zamba2_jax.Zamba2Config.from_pretrained(directory)
    base = model if architecture == "Zamba2Model" else model.model
    for layer in base.layers:
        # transformers clamps dt on the CPU whatever the file says; the models were trained without a clamp.
        mixer = layer.mamba_decoder.mamba if hasattr(layer, "mamba_decoder") else layer.mamba
        mixer.time_step_limit = config.time_step_limit or (0.0, math.inf)

    seen = []
    hooks = [
        module.register_forward_hook(
            lambda _module, _inputs, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        for module in (base.embed_tokens, *base.layers[:-1], base.final_layernorm)
    ]
    with torch.no_grad():
        output = model(torch.tensor([prompt_ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    states = {f"hidden state {index}": state.numpy() for index, state in enumerate(seen)}
    if architecture != "Zamba2Model":
        states["logits"] = output.logits.numpy()
    return states
