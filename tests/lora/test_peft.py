"""LoRAs here against PEFT's on transformers' Zamba2, float32: the same A and B give the same logits and gradients, and
files go both ways.

Tolerances: 1e-4 of the largest logit, 1e-3 of a gradient's largest value, as for the models themselves
(tests/test_models.py); what is measured is around 1e-6.
"""

import warnings

import jax
import peft
import pytest
import safetensors.torch
import torch
import transformers
from flax import nnx

from bench.oracle import jit_call, pair, relative_error, to_torch, without_dt_clamp
from tests.lora.judge import (
    adapted_modules,
    ids,
    is_live,
    own_model,
    randomize,
    torch_adapter,
    torch_logits,
    two_blocks,
)
from zamba2_jax import LoraConfig, add_lora, load_lora, merge_lora, save_lora

TOLERANCE = 1e-4
# One block; two blocks, several uses; three blocks with biases and odd sizes, where transformers does not tie them.
SHAPES = ("1.2B", "7B", "unusual")


def gradients_by_name(model, input_ids, path):
    """d loss / d A and B as PEFT names and shapes them."""
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

    @jax.jit
    def gradient(lora, rest):
        return jax.grad(lambda lora: nnx.merge(graphdef, lora, rest)(input_ids, labels=input_ids).loss)(lora)

    save_lora(nnx.merge(graphdef, gradient(lora, rest), rest), path)
    return safetensors.torch.load_file(path / "adapter_model.safetensors")


@pytest.mark.parametrize("shape", SHAPES)
def test_an_adapter_of_pefts_has_its_logits_and_gradients_here(shape, oracle_dir, tmp_path):
    """Every linear layer, Zamba2's own adapters included; one LoRA per use of a block, as PEFT makes them."""
    models = pair(oracle_dir, shape)
    theirs = torch_adapter(models, target_modules="all-linear", r=3, lora_alpha=5)
    theirs.save_pretrained(tmp_path / "peft")
    ours = own_model(models)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT has LoRAs in slots of adapters that no layer uses
        covered = load_lora(ours, tmp_path / "peft")
    assert all(row.adapted == row.total for row in covered.rows)
    assert ours.lora_config.shared == "use"

    input_ids = ids(models)
    plain = torch_logits(models.torch, input_ids)
    outputs = theirs(to_torch(input_ids), labels=to_torch(input_ids), use_cache=False)
    assert relative_error(plain, outputs.logits) > 0.05  # the LoRAs matter
    assert relative_error(jit_call(ours)(input_ids=input_ids).logits, outputs.logits) < TOLERANCE

    outputs.loss.backward()
    expected = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if "lora_" in name and is_live(name, models.torch.config)
    }
    actual = gradients_by_name(ours, input_ids, tmp_path / "gradients")
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert relative_error(gradient, expected[name]) < 1e-3, name


@pytest.mark.parametrize("shape", ["7B", "unusual"])
def test_peft_loads_what_is_saved_here_and_transformers_what_is_merged(shape, oracle_dir, tmp_path):
    """One LoRA per block: in the file, equal ones under all its uses."""
    models = pair(oracle_dir, shape)
    ours = own_model(models)
    targets = ["in_proj", "out_proj", "q_proj", "v_proj", "gate_up_proj", "down_proj", "linear", "gate_up_adapter"]
    add_lora(ours, LoraConfig(r=3, lora_alpha=5, target_modules=targets), rngs=nnx.Rngs(0))
    randomize(ours)
    input_ids = ids(models)
    expected = jit_call(ours)(input_ids=input_ids).logits

    save_lora(ours, tmp_path / "adapter")
    check_with_peft(models, tmp_path / "adapter", input_ids, expected)
    again = own_model(models)
    load_lora(again, tmp_path / "adapter")
    assert again.lora_config.shared == "block"
    one, other = (dict(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))) for model in (ours, again))
    assert one.keys() == other.keys()
    assert all((one[path].get_value() == other[path].get_value()).all() for path in one)

    merge_lora(ours)
    assert nnx.split(ours)[0] == nnx.split(models.jax)[0]  # nothing is left of the LoRAs
    check_merged(ours, tmp_path / "merged", input_ids, expected)


def check_with_peft(models, path, input_ids, expected):
    base = type(models.torch).from_pretrained(models.path, attn_implementation="eager")
    without_dt_clamp(base)
    with warnings.catch_warnings():
        # PEFT warns of tensors that are missing and of fields that it does not know.
        warnings.simplefilter("error", UserWarning)
        theirs = peft.PeftModel.from_pretrained(base, path).eval()
    assert relative_error(expected, torch_logits(theirs, input_ids)) < TOLERANCE
    saved = safetensors.torch.load_file(path / "adapter_model.safetensors")
    named = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in saved if ".lora_" in name}
    assert adapted_modules(theirs) == named  # target_modules fits these and no others


def check_merged(model, path, input_ids, expected):
    model.save_pretrained(path)
    theirs = transformers.Zamba2ForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    without_dt_clamp(theirs)
    assert relative_error(expected, torch_logits(theirs, input_ids)) < TOLERANCE


def test_a_lora_of_a_block_gets_the_sum_of_its_uses_gradients(oracle_dir, tmp_path):
    models = two_blocks(oracle_dir)
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]}
    ours = own_model(models)
    add_lora(ours, LoraConfig(**config, shared="block"), rngs=nnx.Rngs(0))
    save_lora(randomize(ours), tmp_path / "block")
    of_uses = own_model(models)
    load_lora(of_uses, tmp_path / "block", shared="use")
    actual = gradients_by_name(ours, ids(models), tmp_path / "one")
    parts = gradients_by_name(of_uses, ids(models), tmp_path / "several")
    assert actual.keys() == parts.keys()
    for name, gradient in actual.items():
        layer = int(name.split("layers.")[1].split(".")[0])
        hybrid = list(models.torch.config.hybrid_layer_ids)
        together = [index for use, index in enumerate(hybrid) if (use - hybrid.index(layer)) % 2 == 0]
        total = sum(parts[name.replace(f"layers.{layer}.", f"layers.{index}.")] for index in together)
        assert len(together) == 2
        assert relative_error(gradient, total) < 1e-4, name


def test_ranks_and_alphas_by_name(oracle_dir, tmp_path):
    """A module's scale is its own alpha over the root of its own rank, in files of either origin."""
    models = two_blocks(oracle_dir)
    config = {
        "r": 2,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": ["in_proj", "q_proj"],
        "rank_pattern": {"in_proj": 4, r"layers\.3\..*q_proj": 5},
        "alpha_pattern": {"model.layers.0.mamba.in_proj": 11, "q_proj": 7},
    }
    theirs = torch_adapter(models, **config)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = own_model(models)
    load_lora(loaded, tmp_path / "theirs")
    input_ids = ids(models)
    expected = torch_logits(theirs, input_ids)
    assert relative_error(jit_call(loaded)(input_ids=input_ids).logits, expected) < TOLERANCE

    made = own_model(models)
    add_lora(made, LoraConfig(**config, shared="use"), rngs=nnx.Rngs(0))
    assert made.model.shared_block_uses[2].lora["q_proj"].rank == 5
    nnx.update(made, nnx.state(loaded, nnx.LoRAParam))
    save_lora(made, tmp_path / "ours")
    check_with_peft(models, tmp_path / "ours", input_ids, expected)


def test_a_classifiers_head_goes_with_its_adapter(oracle_dir, tmp_path):
    models = pair(oracle_dir, "1.2B", "Zamba2ForSequenceClassification", num_labels=3)
    theirs = torch_adapter(models, target_modules=["in_proj", "v_proj"], r=2)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = own_model(models)
    load_lora(ours, tmp_path / "theirs")
    input_ids = ids(models)
    expected = torch_logits(theirs, input_ids)
    assert relative_error(jit_call(ours)(input_ids=input_ids).logits, expected) < TOLERANCE

    save_lora(ours, tmp_path / "ours")
    assert not torch.equal(theirs.score.modules_to_save["default"].weight, models.torch.score.weight)
    check_with_peft(models, tmp_path / "ours", input_ids, expected)


def test_loras_of_uses_become_part_of_zambas_own_adapters(oracle_dir, tmp_path):
    """1.2B: adapters on q, k, v and gate_up. Ranks differ, so that zeros must fill up the smaller ones; one use has no
    LoRA at all, and adapters with LoRAs of their own are merged before they are widened."""
    models = pair(oracle_dir, "1.2B")
    ours = own_model(models)
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        shared="use",
        target_modules=["q_proj", "k_proj", "layers.2.shared_transformer.feed_forward.gate_up_proj", "k_adapter"],
        rank_pattern={"k_proj": 2},
    )
    add_lora(ours, config, rngs=nnx.Rngs(0))
    randomize(ours)
    input_ids = ids(models)
    expected = jit_call(ours)(input_ids=input_ids).logits
    save_lora(ours, tmp_path / "adapter")
    check_with_peft(models, tmp_path / "adapter", input_ids, expected)
    with pytest.raises(ValueError, match=r"gate_up_proj, k_proj, q_proj belong .*raise_adapter_rank=True"):
        merge_lora(ours)
    merge_lora(ours, raise_adapter_rank=True)
    assert ours.config.adapter_rank == models.jax.config.adapter_rank + 3
    check_merged(ours, tmp_path / "merged", input_ids, expected)
