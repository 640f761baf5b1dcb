"""Adapters by peft beside a method, attached before or after: trained, saved, resumed, exported."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from mutor import MuToR
from mutor.mtp.adapters import merged
from mutor.mtp.layout import collate
from mutor.mtp.method import Context
from mutor.registry import METHODS, load

peft = pytest.importorskip("peft")
ORDERS = pytest.mark.parametrize("order", ["attach first", "peft first"])
DATA = [{"input_ids": [5, 6, 7, 1, 5, 6, 7, 2 + n % 3], "prefix_length": 4, "index": n} for n in range(32)]


def adapted(model, method, order, **settings):
    """A PeftModel with the method attached."""
    usual = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(**{**usual, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if order == "attach first":
            return peft.get_peft_model(method.attach(model), config)
        return method.attach(peft.get_peft_model(model, config))


def trainer(model, method, folder):
    """Eight steps, a checkpoint in the middle."""
    collator = method.collator(0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        max_steps=8,
        save_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    return Trainer(
        model,
        arguments,
        train_dataset=DATA,
        data_collator=collator,
        callbacks=[collator],
        compute_loss_func=method.loss_from_outputs,
    )


def loud(model):
    """What is trained, moved, so that all of it matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@ORDERS
def test_a_stock_trainer_trains_saves_and_resumes_the_register(tiny, tmp_path, order):
    """Adapters and the register, nothing else; a resumed run ends as one that was not interrupted."""
    ends, ids = [], torch.tensor([DATA[0]["input_ids"]])
    for checkpoint in (None, str(tmp_path / "checkpoint-4")):
        base, method = tiny("llama", scale=1.0), MuToR.of(d_max=3)
        model = adapted(base, method, order)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        register = base.mtp["registers"].weight
        assert {n for n in trained if ".lora_" not in n} == {"base_model.model.mtp.registers.weight"}
        start = register.detach().clone()
        trainer(model, method, tmp_path).train(resume_from_checkpoint=checkpoint)
        assert not torch.equal(register, start)
        ends.append({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    # the saved adapter loads onto a model without this package, and onto one with a register
    plain = peft.PeftModel.from_pretrained(tiny("llama", scale=1.0), tmp_path / "checkpoint-8").eval()
    assert torch.equal(plain(ids).logits, model.eval()(ids).logits)
    other = MuToR.of(d_max=3).attach(tiny("llama", scale=1.0))
    peft.PeftModel.from_pretrained(other, tmp_path / "checkpoint-8")
    assert torch.equal(other.mtp["registers"].weight, register)


@ORDERS
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
    ids=["lora", "dora", "lm_head"],
)
def test_export_merges(tiny, tmp_path, order, settings):
    """The plain architecture with the adapters in its weights; the model that trains keeps them."""
    base, method, ids = tiny("llama"), MuToR.of(d_max=3), torch.tensor([[5, 6, 7, 8]])
    keys = set(base.state_dict())
    model = loud(adapted(base, method, order, **settings))
    wanted = model(ids).logits
    for number, which in enumerate((model, base)):  # the PeftModel, or the model inside
        method.export(which, tmp_path / str(number))
        plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / str(number), output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and set(plain.state_dict()) == keys
        torch.testing.assert_close(plain.eval()(ids).logits, wanted, rtol=1e-4, atol=1e-4)
        assert not (tmp_path / str(number) / "adapter_config.json").exists()
    assert torch.equal(model(ids).logits, wanted) and model.peft_config
    method.save_own(model, tmp_path / "own")
    loaded = MuToR.of(d_max=3).load_own(tiny("llama"), tmp_path / "own")
    assert torch.equal(loaded.mtp["registers"].weight, base.mtp["registers"].weight)
    assert method.added_parameters(model) == 32


@pytest.mark.parametrize("name", ["mutor", "parallel_mtp", "sequential_mtp"])
def test_losses_under_untrained_adapters_are_the_methods_own(tiny, tools, batch, name):
    """The loss and the gradients without peft; layers that a method adds have no adapters and are trained whole."""
    cls, found = load(METHODS, name, "method"), []
    for order in (None, "peft first", *(["attach first"] if name == "mutor" else [])):
        model, method = tiny("llama"), cls(cls.Config(d_max=3))
        whole = adapted(model, method, order, target_modules=["q_proj"]) if order else method.attach(model)
        with torch.no_grad():
            for number, (n, p) in enumerate(model.mtp.named_parameters()):
                p.normal_(0, 0.2 if p.ndim > 1 else 1, generator=torch.Generator().manual_seed(number))
                assert p.requires_grad and "lora" not in n
        loss, _ = method.compute_loss(whole, method.train_layout(batch.rows, Context()))
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.mtp.named_parameters()}))
    for loss, gradients in found[1:]:
        tools.close(loss, found[0][0])
        tools.same_gradients(gradients, found[0][1])


def test_layers_that_a_method_adds_are_trained_beside_a_frozen_model(tiny, batch):
    """They are copies of a frozen layer, and must not be frozen for that."""
    model, cls = tiny("llama").requires_grad_(False), load(METHODS, "parallel_mtp", "method")
    method = cls(cls.Config(d_max=3))
    method.attach(model)
    method.compute_loss(model, method.train_layout(batch.rows, Context()))[0].backward()
    assert all(p.grad is not None for p in model.mtp.parameters())


def test_what_peft_would_copy_or_cover_after_attach_is_refused(tiny, batch):
    """modules_to_save of the register, adapters on the embedding: by name, with what to do; attached last they work."""
    for settings, words in [
        ({"modules_to_save": ["registers"]}, "reached into what the method added .* attach after get_peft_model"),
        ({"modules_to_save": ["embed_tokens"]}, "embeddings were wrapped .* attach afterwards"),
        ({"trainable_token_indices": [5, 6]}, "embeddings were wrapped .* attach afterwards"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embeddings were wrapped .* attach afterwards"),
    ]:
        for order in ("attach first", "peft first"):
            base, method = tiny("llama"), MuToR.of(d_max=3)
            model = adapted(base, method, order, **settings)
            layout = method.train_layout(collate([s.example() for s in batch.spans], 0), Context())
            if order == "attach first":
                with pytest.raises(ValueError, match=f"LlamaForCausalLM.*{words}"):
                    method.compute_loss(model, layout)
                with pytest.raises(ValueError, match=f"LlamaForCausalLM.*{words}"):
                    trainer(model, method, "unused")
            else:
                method.compute_loss(model, layout)[0].backward()
                assert float(base.mtp["registers"].weight.grad.abs().max()) > 0


def test_adapters_inside_layers_that_a_method_added_are_refused(tiny, batch):
    """They would not be saved with the others."""
    cls = load(METHODS, "parallel_mtp", "method")
    method = cls(cls.Config(d_max=3))
    model = adapted(tiny("llama"), method, "attach first")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*reached into .*attach after get_peft_model"):
        method.compute_loss(model, method.train_layout(batch.rows, Context()))


def test_a_register_that_was_frozen_is_noticed(tiny, batch):
    """By a loop over all parameters, say; without gradients it may be."""
    model, method = tiny("llama"), MuToR.of(d_max=3)
    method.attach(model)
    layout = method.train_layout(batch.rows, Context())
    model.requires_grad_(False)
    with torch.no_grad():
        method.compute_loss(model, layout)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*frozen after attach.*requires_grad"):
        method.compute_loss(model, layout)


def test_adapters_that_add_tokens_are_refused(tiny):
    """A method lays out rows itself."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match=r"PROMPT_TUNING adds tokens to each row.*LoRA"):
        MuToR.of().attach(peft.get_peft_model(tiny("llama"), config))


def test_a_model_without_adapters_is_not_copied_to_be_exported(tiny):
    model = tiny("llama")
    assert merged(model) is model and merged(adapted(tiny("llama"), load(METHODS, "mutor", "m").of(), "attach first"))
