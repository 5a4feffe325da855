"""What the models share: construction, files, how their layers are run, and the cache."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any, Self

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from zamba2_jax import cache as cache_lib
from zamba2_jax.cache import Zamba2Cache
from zamba2_jax.checkpoint import load_pretrained, save_pretrained
from zamba2_jax.config import Zamba2Config

if TYPE_CHECKING:
    from zamba2_jax.models import Zamba2Model


class PretrainedModel(nnx.Module):
    """The base class of the three models.

    Attributes:
        config: the architecture.
        dtype: of computation. Norms, softmax, SSM states and losses are float32 whatever it is.
        param_dtype: of stored parameters; A_log, D and dt_bias are float32 whatever it is.
        generation_config: contents of the checkpoint's generation_config.json, or None. Assign a dict to change it.
        lora_config: of the model's LoRAs, or None where it has none (`zamba2_jax.add_lora`).
    """

    def __init__(self, config: Zamba2Config, *, dtype: DTypeLike, param_dtype: DTypeLike | None):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.param_dtype = jnp.dtype(dtype if param_dtype is None else param_dtype)
        for name, value in (("dtype", self.dtype), ("param_dtype", self.param_dtype)):
            if not jnp.issubdtype(value, jnp.floating):
                raise ValueError(f"{name} must be a floating dtype such as bfloat16 or float32, got {value}.")
        self.generation_config = None
        self.lora_config = None

    @property
    def generation_config(self) -> dict[str, Any] | None:
        # Kept as text: a dict could not be hashed, and `nnx.split(model)[0]` is to serve as a static argument of jit.
        return None if self._generation_config is None else json.loads(self._generation_config)

    @generation_config.setter
    def generation_config(self, values: dict[str, Any] | None) -> None:
        if hasattr(values, "to_diff_dict"):  # transformers' GenerationConfig
            values = values.to_diff_dict()
        self._generation_config = None if values is None else json.dumps(values)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        config: Zamba2Config | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        mesh: str | Mesh | None = None,
        quantize: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **config_changes: Any,
    ) -> Self:
        """Loads a checkpoint: a hub id, or a directory in Hugging Face's or our own (Orbax) format.

        Args:
            name_or_path: such as "Zyphra/Zamba2-1.2B", "demo" (`demo_path`), a directory with config.json and weights,
                or one that `python -m train` writes: a run's last checkpoint, or "DIRECTORY@STEP".
            config: in place of the checkpoint's.
            dtype: of computation; None and "auto" take the config's, then the file's.
            param_dtype: of the stored parameters; None is `dtype`.
            mesh: devices to spread the parameters over (`zamba2_jax.sharding.RULES`): a `Mesh`, or as in
                `zamba2_jax.sharding.make_mesh` "auto" or sizes such as "data=2,fsdp=4". None puts them on the default
                device.
            quantize: "int8" or "int4" stores the matrices as integers, in about half or a quarter of bfloat16's memory
                (`zamba2_jax.quantize`). They are not trained; LoRAs beside them are (`zamba2_jax.add_lora`). The model
                cannot be saved, its LoRAs can.
            revision, token, cache_dir, local_files_only: as in `huggingface_hub.snapshot_download`.
            config_changes: fields of the config to set, such as `num_labels=3` for a classifier whose head is new, or
                `attention_dropout=0.1`.

        Raises:
            FileNotFoundError: no such directory or no config.json in it.
            TypeError: an argument of another name; of transformers' it says what serves here.
            ValueError: another kind of model, or tensors that are missing, unexpected, misshapen, truncated or
                contradictory; all are named.
        """
        return load_pretrained(
            cls,
            name_or_path,
            config=config,
            config_changes=config_changes,
            dtype=dtype,
            param_dtype=param_dtype,
            mesh=mesh,
            quantize=quantize,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        *,
        max_shard_size: str | int = "5GB",
        dtype: DTypeLike | None = None,
        overwrite: bool = False,
    ) -> None:
        """Writes config.json, generation_config.json and safetensors that transformers' `from_pretrained` loads, bit
        for bit.

        Args:
            path: a directory: new, empty, or holding nothing but a checkpoint, which is replaced.
            max_shard_size: of one file, such as "2GB".
            dtype: to store weights in; None is `param_dtype`.
            overwrite: write even among files that are no part of a checkpoint; they stay.

        Raises:
            ValueError: `path` holds something else, or an argument makes no sense.
            OSError: it cannot be written; nothing is left behind.
        """
        save_pretrained(self, path, max_shard_size=max_shard_size, dtype=dtype, overwrite=overwrite)

    def gradient_checkpointing_enable(self, policy: str = "layer") -> None:
        """Makes the backward pass recompute what the forward pass then need not keep. Results and gradients are the
        same.

        Takes effect in `nnx.split` and in calls made afterwards; saved nowhere. Calls with a cache are not affected.

        Args:
            policy: what is kept of each mamba layer, and of each use of a shared block's attention and MLP. All is kept
                of the last layer, whose backward pass comes first, unless layers are scanned.
                "layer": its input and result alone, (b, l, d) each. The least memory; the forward pass runs twice, but
                for the last matrix product of each.
                "attention": also attention's queries and what it gives, twice (b, l, 2 d) for each use of a shared
                block: the one part whose time grows with the square of the length is not run again.
                "projections": also the results of its wide matrix products: gate, x, B, C and dt of a mamba layer,
                some (b, l, 2 E) numbers; queries, keys, values, the attention's and MLP's outputs, gate and up of a
                shared block, some (b, l, 16 d). Recomputed are norms, activations, convolution and state-space
                recurrence.
                "none": everything that the backward pass reads, as without checkpointing.

        Raises:
            ValueError: another policy.
        """
        self._set_execution(checkpoint=policy)

    def gradient_checkpointing_disable(self) -> None:
        """Undoes `gradient_checkpointing_enable`."""
        self._set_execution(checkpoint="none")

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self._base.execution.checkpoint != "none"

    def scan_layers_enable(self) -> None:
        """Compiles one body for all equal layers, and scans it: a handful of bodies for any depth (`layer_pattern`).

        The layers' arrays are stacked inside the jitted function, matrices in the compute dtype, and so are their
        gradients: that is a copy of each. Worth it where compiling many layers is slow; measure, for it is not
        everywhere: of the 1.2B shape's gradient (policy "layer", 2048 tokens, bfloat16), libtpu's compiler for a v5e
        took as long either way, and its temporary memory was 7.7 GB instead of 0.6. Calls of one token with a cache are
        never scanned. Results and gradients are the same. Takes effect in `nnx.split` and in calls made afterwards;
        saved nowhere.
        """
        self._set_execution(scan=True)

    def scan_layers_disable(self) -> None:
        """Undoes `scan_layers_enable`."""
        self._set_execution(scan=False)

    @property
    def is_scanning_layers(self) -> bool:
        return self._base.execution.scan

    @property
    def _base(self) -> Zamba2Model:
        """The model without its head, which runs the layers."""
        return getattr(self, "model", self)

    def _set_execution(self, **changes: Any) -> None:
        self._base.execution = dataclasses.replace(self._base.execution, **changes)

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        dtype: DTypeLike | None = None,
        ssm_dtype: DTypeLike = jnp.float32,
    ) -> Zamba2Cache:
        """An empty cache for `batch_size` rows of up to `max_length` tokens; dtype None is the compute dtype. Another
        `ssm_dtype` than float32 halves the Mamba2 states at a loss (`zamba2_jax.cache.init_cache`)."""
        dtype = self.dtype if dtype is None else dtype
        return cache_lib.init_cache(self.config, batch_size, max_length, dtype, ssm_dtype)
