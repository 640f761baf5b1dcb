"""Kinds of parallel heads, and what they read, against plain loops over one sequence at a time."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_trunk import finished, made

from mutor.config.recipe import Recipe
from mutor.mtp.method import Context
from mutor.training.optim import optimizer

CASES = [
    {"head": "linear"},
    {"head": "mlp"},
    {"head": "output"},
    {"head": "output", "hidden": "uniform", "injection": 0.4},
    {"head": "layer", "leap": 2, "d_max": 5},
    {"head": "layer", "hidden": "weighted"},
    {"head": "linear", "hidden": "uniform", "leap": 3, "d_max": 4},
    {"head": "layer", "injection": 0.7},
    {"head": "linear", "latent_hidden": 0.1, "latent_token": 0.3},
    {"head": "mlp", "hidden": "uniform", "injection": -0.5, "latent_hidden": 0.2, "latent_token": 0.1},
]


def all_states(model, ids, mask):
    """[T, d] what the first layer reads, and what each layer gives, by a forward of the stock model."""
    layers, seen = model.base_model.h if model.config.model_type == "gpt2" else model.base_model.layers, []
    hooks = [
        layer.register_forward_pre_hook(
            lambda m, args, kw: seen.append(args[0] if args else kw["hidden_states"]), with_kwargs=True
        )
        for layer in layers
    ]
    hooks.append(
        layers[-1].register_forward_hook(lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    )
    model(input_ids=torch.tensor([ids]), attention_mask=mask[None, None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return [state[0] for state in seen]


@pytest.mark.parametrize("case", CASES, ids=lambda case: ",".join(map(str, case.values())))
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_heads_are_plain_loops(tiny, tools, family, batch, case):
    """Losses, and gradients of every parameter; stopped ones of latent targets among them."""
    settings = {"d_max": 3, "a": 0.3, **case}
    model, method = tiny(family), made("parallel_mtp", **settings)
    tools.attach(method, model)
    total, parts = method.compute_loss(model, method.train_layout(batch.rows, Context(prefix_lm=True)))
    _, norm, head, run = tools.parts_of(model)
    further = list(range(1 + settings.get("leap", 1), settings["d_max"] + 1, settings.get("leap", 1)))
    losses, embedding, mtp = {k: [] for k in [1, *further]}, model.get_input_embeddings(), model.mtp
    for span in batch.spans:
        mask, length = tools.prefix_mask(len(span.ids), span.prefix, True), len(span.ids)
        states, ids = all_states(model, span.ids, mask), torch.tensor(span.ids)
        normed = norm(states[-1])
        for i in range(span.prefix - 1, length - 1):
            losses[1].append(F.cross_entropy(head(normed[i]), ids[i + 1]))
        for n, k in enumerate(further):
            hidden = states[-1]
            if "hidden" in settings:
                logits = mtp["layer_weights"][n] + torch.tensor([0.0] * 2 + [10.0 * (case["hidden"] == "weighted")])
                hidden = sum(share * state for share, state in zip(logits.softmax(0), states, strict=True))
            if "injection" in settings:
                nexts = embedding(torch.cat([ids[1:], ids[:1]]))  # the last one predicts nothing
                hidden = hidden + mtp["injection"][n] * nexts
            if case["head"] == "layer":
                out = norm(run(mtp["heads"][n], hidden[None], mask)[0])
            elif case["head"] == "linear":
                out = norm(hidden) @ mtp["heads"][n].weight.T
            elif case["head"] == "output":
                out = norm(hidden)
            else:
                out = norm(hidden) + F.silu(mtp["heads"][n](norm(hidden)))
            logits_of = mtp["heads"][n] if case["head"] == "output" else head
            for i in range(span.prefix - 1, length - k):
                loss = F.cross_entropy(logits_of(out[i]), ids[i + k])
                for key, wanted in (("hidden", normed[i + k - 1]), ("token", embedding(ids[i + k]))):
                    far = (out[i] - wanted.detach()).pow(2).mean()
                    loss = loss + settings.get(f"latent_{key}", 0.0) * far
                losses[k].append(loss)
    means = {k: torch.stack(some).mean() for k, some in losses.items()}
    for k in further:
        tools.close(parts[f"head_{k}"], means[k].detach())
    assert parts.keys() == {"next_token", *(f"head_{k}" for k in further)}
    theirs = 0.7 * means[1] + 0.3 * torch.stack([means[k] for k in further]).mean()
    tools.close(total, theirs)
    ours = tools.gradients(model, total)
    tools.same_gradients(ours, tools.gradients(model, theirs))
    assert all(float(g.abs().max()) > 0 for n, g in ours.items() if "mtp" in n and "k_proj.bias" not in n)


@pytest.mark.parametrize("case", [{"hidden": "weighted"}, {"injection": 0.0}, {"hidden": "weighted", "injection": 0.0}])
@pytest.mark.parametrize("kind", ["layer", "linear"])
def test_they_start_as_the_ordinary_head(tiny, batch, case, kind):
    losses = []
    for settings in ({}, case):
        model, method = tiny("llama"), made("parallel_mtp", d_max=3, head=kind, **settings)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            method.attach(model)
            with torch.no_grad():
                for parameter in model.mtp["heads"].parameters():
                    parameter.mul_(10)  # fresh heads say little, whatever they read
        total, _ = method.compute_loss(model, method.train_layout(batch.rows, Context()))
        losses.append(float(total.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_medusas_head_starts_as_the_trunk(tiny, batch):
    """Zero weights: each head predicts what the model predicts of the next token."""
    model, method = tiny("llama"), made("parallel_mtp", d_max=3, head="mlp")
    method.attach(model)
    layout = method.train_layout(batch.rows, Context())
    _, parts = method.compute_loss(model, layout)
    out, targets = method.trunk(model, layout), method.loss_targets(layout)
    for k in (2, 3):
        assert torch.equal(parts[f"head_{k}"], method.cross_entropy(out.normed, targets[f"head_{k}"]).detach())


@pytest.mark.parametrize(
    ("settings", "added"),
    [
        ({"head": "linear"}, 2 * 32 * 32),
        ({"head": "mlp"}, 2 * (32 * 32 + 32)),
        ({"head": "output"}, 2 * 61 * 32),
        ({"head": "linear", "hidden": "weighted", "injection": 1.0}, 2 * (32 * 32 + 3 + 1)),
    ],
)
def test_what_heads_add_is_saved_and_loads(tiny, tmp_path, settings, added):
    method = made("parallel_mtp", d_max=3, **settings)
    model = method.attach(tiny())
    assert method.added_parameters(model) == added
    method.save_own(model, tmp_path)
    again = made("parallel_mtp", d_max=3, **settings).load_own(tiny(), tmp_path)
    assert all(torch.equal(value, model.mtp.state_dict()[name]) for name, value in again.mtp.state_dict().items())


def test_weights_of_layers_have_their_own_rate(tiny):
    method = made("parallel_mtp", hidden="weighted", hidden_rate=7.0, injection=0.5, head="mlp", trunk_rate=0.5)
    model = method.attach(tiny("llama"))
    groups = optimizer(model, method, Recipe(steps=2, batch_size=1, learning_rate=1e-3, weight_decay=0.1)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found["mtp.layer_weights.0"] == (pytest.approx(7e-3), 0.0) and found["mtp.injection.0"] == (1e-3, 0.0)
    assert found["mtp.heads.0.weight"] == (1e-3, 0.1) and found["lm_head.weight"] == (5e-4, 0.1)


def test_a_run_of_all_together(tmp_path):
    """Trains, waits, fades, is scored; its own weights beside the plain model have moved."""
    settings = {"head": "linear", "hidden": "weighted", "injection": 0.1, "latent_hidden": 0.1, "latent_token": 0.1}
    settings |= {"d_max": 3, "warm_up": 0.25, "a_schedule": "quarter_sine", "entropy_limit": 2.6, "trunk": "lora"}
    folder, record, _ = finished("parallel_mtp", tmp_path, **settings)
    own = load_file(folder / "last/method/weights.safetensors")
    assert record["steps"] == 20 and {"head_2", "head_3"} <= record["curve"][0].keys()
    assert all(own[f"layer_weights.{n}"].abs().max() > 0 and own[f"injection.{n}"] != 0.1 for n in (0, 1))
