"""TRL's SFTTrainer the usual way: its data formats, with a method's collator and loss."""

import pytest
import torch
from test_trainer import made

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
WORDS = ["<pad>", "<s>", "</s>", "user", "assistant", ":", *map(str, range(40))]
CHAT = (
    "{% for m in messages %}{{ m['role'] + ' : ' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + ' </s> ' }}{% endgeneration %}{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    whole = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<pad>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.chat_template = CHAT
    return made


def count(start, length):
    """Numbers that follow each other, as text."""
    return " ".join(str((start + n) % 40) for n in range(length))


PAIRS = [{"prompt": count(n, 2) + " ", "completion": count(n + 2, 3) + " "} for n in range(24)]
CHATS = [
    {
        "messages": [
            {"role": role, "content": count(n + k, 2)} for k, role in enumerate(["user", "assistant"] * 2)
        ]
    }
    for n in range(24)
]  # fmt: skip
KINDS = {
    "prompt and completion": (PAIRS, {}),
    "messages": (CHATS, {"assistant_only_loss": True}),
    "packed": (PAIRS, {"packing": True, "max_length": 16}),
}


@pytest.mark.parametrize(
    ("name", "kind"), [*(("mutor", kind) for kind in KINDS), ("parallel_mtp", "messages"), ("sequential_mtp", "packed")]
)
def test_sft_trains_a_method(tiny, tokenizer, tmp_path, name, kind):
    """Two steps; eval_loss is the loss of next tokens alone, of the answers alone."""
    rows, settings = KINDS[kind]
    model, data = tiny("llama", scale=1.0), datasets.Dataset.from_list(rows)
    method = made(name, model)
    collator = method.collator(tokenizer.pad_token_id)
    arguments = trl.SFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, max_steps=2, logging_steps=1,
        per_device_train_batch_size=4, per_device_eval_batch_size=24, save_strategy="no", learning_rate=1e-2,
        dataloader_pin_memory=False, gradient_checkpointing=False, remove_unused_columns=False, **settings,
    )  # fmt: skip
    packed = "packing" in settings  # then TRL takes no other collator at first
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer, callbacks=[collator],
        compute_loss_func=method.loss_from_outputs, data_collator=None if packed else collator,
    )  # fmt: skip
    trainer.data_collator = collator
    start = [p.detach().clone() for p in model.mtp.parameters()]
    trainer.train()
    assert all(not torch.equal(was, p) for was, p in zip(start, model.mtp.parameters(), strict=True))
    found, losses = trainer.evaluate()["eval_loss"], []
    for row in trainer.eval_dataset:
        at = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            ids, labels = (torch.tensor(row[key][at : at + length]) for key in ("input_ids", "labels"))
            at, labels[0] = at + length, -100
            with torch.no_grad():
                logits = model.eval()(ids[None]).logits[0, :-1]
            losses += torch.nn.functional.cross_entropy(logits, labels[1:], reduction="none")[labels[1:] != -100]
    assert found == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert 24 * 4 <= len(losses) < sum(len(row["input_ids"]) for row in trainer.eval_dataset) - 24
