"""Hugging Face's Trainer, Lightning and Accelerate train with LoLO, and resume from a checkpoint bit for bit."""

import importlib.util

import pytest
import torch

from lolo.torch import LoLO

pytestmark = [pytest.mark.torch, pytest.mark.slow]

ACCELERATE, LIGHTNING, TRANSFORMERS = (
    pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs {name}")
    for name in ("accelerate", "lightning", "transformers")
)
STEPS, HALF = 6, 3
SHIPPED_RATE, SHIPPED_DECAY = (LoLO([torch.zeros(1)]).param_groups[0][name] for name in ("lr", "weight_decay"))


@pytest.fixture(autouse=True)
def without_a_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("DO_NOT_TRACK", "1")


def assert_same(ours, theirs):
    """Model, optimizer state and settings of (model, optimizer) pairs agree bit for bit."""
    for one, other in zip(ours[0].parameters(), theirs[0].parameters(), strict=True):
        assert torch.equal(one, other)
    one, other = (pair[1].state_dict() for pair in (ours, theirs))
    assert one["param_groups"] == other["param_groups"] and one["state"].keys() == other["state"].keys()
    for index, state in one["state"].items():
        assert state.keys() == other["state"][index].keys()
        assert all(torch.equal(x, other["state"][index][name]) for name, x in state.items())


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 5, generator=generator).split([3, 2], dim=1) for _ in range(HALF)]


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(8, 2))


# Hugging Face


def language_model():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 24, "n_positions": 8}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def texts():
    tokens = torch.randint(24, (12, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": x, "labels": x} for x in tokens]


def trainer_of(folder, model, optimizer=None, **more):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_steps=HALF,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    given = {"optimizers": (optimizer, None)} if optimizer is not None else more
    return Trainer(model=model, args=arguments, train_dataset=texts(), **given)


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


@TRANSFORMERS
def test_hugging_faces_trainer_resumes_bit_for_bit(tmp_path):
    runs = []
    for start in (None, tmp_path / f"checkpoint-{HALF}"):
        model = language_model()
        optimizer = LoLO(model.parameters())
        trainer = trainer_of(tmp_path, model, optimizer)
        trainer.train(resume_from_checkpoint=start and str(start))
        runs.append((model, optimizer, trainer))
    plain, resumed = runs
    losses, others = (logged(trainer, "loss") for *_, trainer in runs)
    assert len(losses) == STEPS and others == losses
    assert_same(resumed[:2], plain[:2])
    # What it adds by itself, as docs/use.md says: a line from 1 to 0, and clipping. Weight decay stays as shipped.
    assert logged(plain[2], "learning_rate") == pytest.approx(
        [SHIPPED_RATE * (1 - step / STEPS) for step in range(STEPS)]
    )
    assert plain[2].args.max_grad_norm == 1.0
    assert [group["weight_decay"] for group in plain[1].param_groups] == [SHIPPED_DECAY]


@TRANSFORMERS
def test_hugging_faces_trainer_switches_weight_decay_off_where_it_makes_the_optimizer(tmp_path):
    trainer = trainer_of(tmp_path, language_model(), optimizer_cls_and_kwargs=(LoLO, {}))
    trainer.create_optimizer()
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.0, 0.0]
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [SHIPPED_RATE] * 2
    assert SHIPPED_DECAY > 0


# Lightning


def lightning_module():
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses = small_model(), []

        def training_step(self, batch, index):
            loss = torch.nn.functional.mse_loss(self.model(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            self.optimizer = LoLO(self.parameters())
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
            return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Module()


@LIGHTNING
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_lightning_resumes_bit_for_bit(tmp_path):
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    runs = []
    for start in (None, tmp_path / "epoch=0.ckpt"):
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        trainer = lightning.Trainer(
            max_epochs=STEPS // HALF,
            accelerator="cpu",
            gradient_clip_val=1.0,
            callbacks=[keep],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = lightning_module()
        module.model[2].p = 0.0  # Lightning keeps no state of random numbers
        trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None), ckpt_path=start)
        runs.append(module)
    plain, resumed = runs
    assert len(plain.losses) == STEPS and resumed.losses == plain.losses[HALF:]
    assert_same((resumed, resumed.optimizer), (plain, plain.optimizer))


# Accelerate


def accelerated(precision="no"):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    model = small_model()
    optimizer = LoLO(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    return accelerator, model, optimizer, accelerator.prepare(model, optimizer, schedule)


def train(accelerator, prepared, steps):
    model, optimizer, schedule = prepared
    found = []
    for inputs, targets in (batches() * steps)[: 2 * steps]:
        with accelerator.accumulate(model):
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


@ACCELERATE
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_resumes_bit_for_bit(tmp_path, precision):
    accelerator, model, optimizer, prepared = accelerated(precision)
    train(accelerator, prepared, HALF)
    accelerator.save_state(str(tmp_path / "state"))
    expected = train(accelerator, prepared, HALF)
    accelerator, again, its_optimizer, prepared = accelerated(precision)
    accelerator.load_state(str(tmp_path / "state"))
    assert train(accelerator, prepared, HALF) == expected
    assert_same((again, its_optimizer), (model, optimizer))
    assert {int(state["step"]) for state in its_optimizer.state_dict()["state"].values()} == {STEPS}
