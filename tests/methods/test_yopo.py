"""YOPO against a simulation like the released one: eager attention whose weights are masked after the softmax."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import repeat_kv

import foveate
from foveate.methods.yopo import YOPO, read_heads

from .. import reference, zoo

NEW = 6


class Simulated:
    """An unmodified decoder that runs one row in full, with the pattern simulated; visual tokens really leave at ``cut``."""

    def __init__(self, model, columns: list[int], window: int | None, heads, neurons: float, cut: int) -> None:
        self.model, self.columns, self.window, self.heads, self.neurons, self.cut = model, columns, window, heads, neurons, cut
        self.decoder = model.get_decoder()

    def attention(self, module, query, key, value, mask, scaling, **kwargs):
        layer, length = module.layer_idx, query.shape[2]
        visual = torch.zeros(length, dtype=torch.bool)
        visual[self.columns] = True
        allowed = torch.ones(length, length, dtype=torch.bool).tril()
        if layer >= self.cut:
            allowed = allowed & ~visual
            allowed = allowed | torch.eye(length, dtype=torch.bool)
        elif self.window is not None:
            for i, a in enumerate(self.columns):
                for j, b in enumerate(self.columns):
                    near = max(abs(i // zoo.COLUMNS - j // zoo.COLUMNS), abs(i % zoo.COLUMNS - j % zoo.COLUMNS))
                    allowed[a, b] = near <= (self.window - 1) // 2
        groups = module.num_key_value_groups
        logits = query @ repeat_kv(key, groups).transpose(2, 3) * scaling
        weights = logits.masked_fill(~allowed, float("-inf")).softmax(-1)
        pruned = torch.zeros(query.shape[1], dtype=torch.bool)
        if self.heads is not None:
            pruned = ~torch.tensor(self.heads[layer]).repeat_interleave(groups)
        weights = weights.masked_fill(pruned[:, None, None] & visual, 0)
        out = weights @ repeat_kv(value, groups)
        out = out.masked_fill(pruned[:, None, None] & visual[:, None], 0)
        return out.transpose(1, 2).contiguous(), None

    @torch.no_grad()
    def logits(self, embeddings, tokens):
        AttentionInterface.register("simulated_yopo", self.attention)
        before = self.decoder.config._attn_implementation
        self.decoder.config._attn_implementation = "simulated_yopo"

        def narrow(_, args):
            inner = args[0].clone()
            inner[:, self.columns, int(inner.shape[-1] * self.neurons) :] = 0
            return (inner,)

        handles = [layer.mlp.down_proj.register_forward_pre_hook(narrow) for layer in self.decoder.layers[: self.cut]]
        try:
            found = []
            for token in tokens:
                hidden = self.decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state
                found.append(self.model.get_output_embeddings()(hidden[0, -1]))
                embeddings = torch.cat([embeddings, self.model.get_input_embeddings()(torch.tensor([[token]]))], 1)
            return torch.stack(found)
        finally:
            for handle in handles:
                handle.remove()
            self.decoder.config._attn_implementation = before


HEADS = ((True, True), (True, False), (False, True), (True, True))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("decoder", ["llama", "qwen3"])
@pytest.mark.parametrize(
    ("window", "heads", "neurons", "cut"),
    [(5, None, 1.0, 4), (None, HEADS, 1.0, 4), (None, None, 0.5, 4), (None, None, 1.0, 2), (3, HEADS, 0.25, 3), (5, HEADS, 0.5, 2)],
)
def test_every_part_equals_its_simulation(tmp_path, decoder, attn, window, heads, neurons, cut):
    model, inputs = zoo.load(decoder=decoder, attn=attn), zoo.batch()
    plain, file = zoo.load(decoder=decoder), tmp_path / "heads.json"
    file.write_text(json.dumps({"heads": heads}))
    method = YOPO(window=window, neurons=neurons, layer_cut=cut, heads=str(file) if heads else None)
    encoded = foveate.encode(model, foveate.Spatial(budget=1.0), **inputs)
    with method(model) as session:
        out = model.generate(
            **inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        assert session.report.layers == [256] * cut + [0] * (4 - cut)
    logits = torch.stack(out.logits, 1)
    for row in (0, 3):
        mine = [i for i, image in enumerate(session.report.images) if image.row == row]
        every = [list(range(zoo.TOKENS))]
        embeddings, _ = reference.spliced_embeddings(model, inputs, row, every, [encoded.embeds[i] for i in mine], zoo.IMAGE)
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        columns = (ids == zoo.IMAGE).nonzero().flatten().tolist()
        wanted = Simulated(plain, columns, window, heads, neurons, cut).logits(embeddings, out.sequences[row, -NEW:].tolist())
        torch.testing.assert_close(logits[row], wanted, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("decoder", ["phi", "phi3", "gemma3", "mistral"])
def test_other_shapes_of_layers_silence_what_they_cannot_save(tmp_path, decoder):
    """Fused projections and plain MLPs: rows of a batch equal rows alone, and the model is restored."""
    model, inputs, file = zoo.load(decoder=decoder), zoo.batch(), tmp_path / "heads.json"
    file.write_text(json.dumps({"heads": HEADS}))
    before = model(**inputs).logits
    with YOPO(heads=str(file))(model):
        together = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
        for row in range(4):
            alone = model.generate(**zoo.batch(rows=(row,)), max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
            torch.testing.assert_close(together.logits[0][row], alone.logits[0][0], atol=2e-4, rtol=2e-4)
        assert not torch.allclose(model(**inputs).logits[:, -1], before[:, -1])
    assert torch.equal(model(**inputs).logits, before)


def test_bad_settings(tmp_path):
    for fields, message in (
        (dict(window=4), "odd"),
        (dict(neurons=0.0), "neurons"),
        (dict(budget=12), "share of the layers"),
        (dict(heads=str(tmp_path / "none.json")), "no head mask"),
    ):
        with pytest.raises(foveate.InputError, match=message):
            YOPO(**fields)
    file = tmp_path / "heads.json"
    file.write_text(json.dumps({"heads": [[True]]}))
    assert read_heads(file) == ((True,),)
    with pytest.raises(foveate.InputError, match="calibrate on this model"):
        YOPO(heads=str(file))(zoo.load()).attach()


def test_weights_that_are_brought_in_later():
    """accelerate's offloading puts its hooks on single linear layers: their weights cannot be cut into slices before."""
    accelerate = pytest.importorskip("accelerate")
    model, inputs = zoo.load(), zoo.batch()
    with foveate.YOPO()(model):
        expected = model(**inputs).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with foveate.YOPO()(model):
        torch.testing.assert_close(model(**inputs).logits, expected)
