"""A base model's name may stand for other weights one day: what was made on the former ones waits for them."""

import asyncio
import json
import os
import shutil

import pytest

from tests.base_weights import other_weights, tensors_of, write
from tests.control.conftest import BATCH, NANO, OWNER, Client
from tinkercloud.engine import fingerprint
from tinkercloud.engine.fingerprint import SAMPLED_DIGITS, fingerprint_of, same_weights
from tinkercloud.engine.operations import AdamParams, ForwardBackward, OptimStep, Sample, SamplingParams
from tinkercloud.engine.results import Failure, LossOutput, SampleOutput
from tinkercloud.errors import InvalidRequest
from tinkercloud.ledger.records import ModelRecord
from tinkercloud.nano import FOLDER


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return other_weights(tmp_path_factory.mktemp("models") / "fine-tuned")


def draw(sampler) -> Sample:
    return Sample("", sampler.sampler_id, BATCH[0].tokens, SamplingParams(max_tokens=4, seed=1))


def test_a_run_waits_for_its_weights_and_goes_on_with_them(serving, run, undisturbed, other):
    async def story():
        async with serving() as service:
            client = await Client.create(service)
            losses = await client.steps(2)
            saved = await client.save("kept")
            sampler = await service.samplers.create(client.session, 7, NANO, None)
            expected = await client.result(await service.samplers.sample(sampler, 0, draw(sampler)))
            await service.models.withdraw(NANO)
            kept = await client.send("forward_backward", ForwardBackward(client.model.model_id, BATCH, "cross_entropy"))
            drawn, unwanted = [await service.samplers.sample(sampler, seq, draw(sampler)) for seq in (1, 2)]
        async with serving(models=[f"{NANO}={other}"]) as service:
            client.service = service
            await service.models.settled()
            for refused in (
                client.send("optim_step", OptimStep(client.model.model_id, AdamParams())),
                client.load(saved),
                client.created_from(saved),
                service.samplers.create(client.session, 8, None, saved.path),
                service.samplers.sample(sampler, 3, draw(sampler)),
            ):
                with pytest.raises(InvalidRequest) as raised:
                    await refused
                assert str(FOLDER) in str(raised.value) and str(other) in str(raised.value), "before, and now"
                assert "serve the former weights" in str(raised.value), "and what to do"
            client.seq_id = kept.seq_id
            fresh = await Client.create(service)
            assert await fresh.steps(1) != undisturbed[:1], "who begins now has the weights that are served now"
            for entry in (kept, drawn):
                _, outcome = await service.futures.outcome(entry.request_id, OWNER, timeout=0.2)
                assert outcome is None, "it was accepted: it is neither run on other weights nor lost"
                assert "goes on then" in await service.futures.paused(entry)
            desk = service.models.get(NANO).desk
            assert desk.pending == 2
            await desk.cancel(unwanted.request_id)
            outcome = await client.result(unwanted)
            assert isinstance(outcome, Failure) and "cancelled" in outcome.error and desk.pending == 1
            leaving = await Client.create(service)
            await leaving.result(await service.runs.unload(leaving.model))
        async with serving() as service:
            client.service = service
            outcome = await client.result(kept)
            assert isinstance(outcome, LossOutput)
            losses.append(outcome.metrics["loss:sum"])
            await client.optim_step()
            losses += await client.steps(2)
            outcome = await client.result(drawn)
            assert isinstance(outcome, SampleOutput)
            assert outcome.sequences[0].tokens.tolist() == expected.sequences[0].tokens.tolist()
            again = await client.created_from(saved)
            assert await again.steps(1) == undisturbed[2:3]
        assert losses == undisturbed[:5]

    run(story)


def test_what_was_made_before_weights_were_recorded_gets_those_that_it_runs_on(shared, other):
    async def story(service):
        client = await Client.create(service)
        await client.steps(1)
        await service._ledger.change(ModelRecord, client.model.model_id, base_fingerprint="")
        run = service.models.get(NANO).conductor._runs[client.model.model_id]
        run.record = await service._ledger.get(ModelRecord, client.model.model_id)
        run.mistrust()
        await client.steps(1)
        recorded = await service._ledger.get(ModelRecord, client.model.model_id)
        served = (await service.models.info(NANO)).fingerprint
        assert recorded.base_fingerprint == served != ""
        of_other = fingerprint_of(other)
        for former, is_same in (
            (served[-SAMPLED_DIGITS:], True),
            (of_other[-SAMPLED_DIGITS:], False),
            (of_other[:-SAMPLED_DIGITS] + served[-SAMPLED_DIGITS:], False),
        ):
            await service._ledger.change(ModelRecord, client.model.model_id, base_fingerprint=former)
            client.model = await service._ledger.get(ModelRecord, client.model.model_id)
            assert same_weights(former, served) == is_same, "recorded when they were of samples alone"
            if is_same:
                await client.steps(1)
            else:
                with pytest.raises(InvalidRequest, match="other weights") as raised:
                    await client.steps(1)
                shown = former[:12], served[-len(former) :][:12]
                assert all(digits in str(raised.value) for digits in shown), "digits to compare"

    shared(story)


def test_a_lazy_model_whose_files_were_put_back_while_it_was_unloaded_goes_on(
    serving, run, tmp_path, other, undisturbed, caplog
):
    """With what was accepted before it was known that they are others, of which the log tells."""
    folder = tmp_path / "lazy"
    shutil.copytree(FOLDER, folder)

    async def story():
        lazy = {"name": NANO, "source": str(folder), "lazy": True, "idle_seconds": 0.01}
        async with serving(models=[lazy]) as service:

            async def unloaded_with(source):
                while service.models.states()[NANO] == "ready":
                    await service.models.unload_idle(service.models.get(NANO))
                    await asyncio.sleep(0.01)
                shutil.copyfile(source / "model.safetensors", folder / "model.safetensors")

            client = await Client.create(service)
            losses = await client.steps(1)
            sampler = await service.samplers.unbound(OWNER, NANO, None)
            await unloaded_with(other)
            samples = [await service.samplers.sample(sampler, number, draw(sampler)) for number in range(2)]
            kept = await client.send("forward_backward", ForwardBackward(client.model.model_id, BATCH, "cross_entropy"))
            await service.models.get(NANO).engine.loaded(now=True)
            with pytest.raises(InvalidRequest, match="serve the former weights"):
                await client.send("optim_step", OptimStep(client.model.model_id, AdamParams()))
            assert caplog.text.count(f"samples wait. sampler {sampler.sampler_id} was made on") == 1
            for sample in samples:  # which keep it from being unloaded
                await service.samplers.cancel(sample.request_id, OWNER)
            await unloaded_with(FOLDER)
            client.seq_id = kept.seq_id
            await client.optim_step()
            losses.append((await client.result(kept)).metrics["loss:sum"])
            assert losses + await client.steps(1) == undisturbed[:3]

    run(story)


# ---------------------------------------------------------------- the fingerprint


def test_weights_are_known_wherever_and_in_whatever_files_they_lie(tmp_path, other):
    folder = tmp_path / "moved"
    shutil.copytree(FOLDER, folder)
    weights = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, of_it in files.items():
        write(folder / file, {name: weights[name] for name in of_it})
    where = {name: file for file, of_it in files.items() for name in of_it}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    config = json.loads((folder / "config.json").read_text())
    says = {"transformers_version": "9", "eos_token_id": 3, "_name_or_path": "elsewhere"}
    (folder / "config.json").write_text(json.dumps(config | says))
    assert fingerprint_of(folder) == fingerprint_of(FOLDER) != fingerprint_of(other)
    shutil.copy(other / "model.safetensors", folder)
    assert fingerprint_of(folder) == fingerprint_of(other), "as transformers does, which loads a single file first"
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1.0}))
    assert fingerprint_of(folder) != fingerprint_of(FOLDER), "the same tensors, other numbers"


def test_a_change_of_one_bit_shows(tmp_path):
    weights = tensors_of(FOLDER)
    large = max(weights, key=lambda name: len(weights[name][2]))
    small = min(weights, key=lambda name: len(weights[name][2]))
    seen = {fingerprint_of(FOLDER)}
    for name, at in ((large, 0), (large, -1), (large, len(weights[large][2]) // 2 + 777), (small, 1)):
        dtype, shape, data = weights[name]
        changed = bytearray(data)
        changed[at] ^= 1
        shutil.copytree(FOLDER, tmp_path / "changed", dirs_exist_ok=True)
        write(tmp_path / "changed" / "model.safetensors", weights | {name: (dtype, shape, bytes(changed))})
        seen.add(fingerprint_of(tmp_path / "changed"))
    assert len(seen) == 5


def test_weights_are_read_again_when_their_files_have_changed(tmp_path, monkeypatch, caplog):
    """Also in place, by a program that gives them the time that they had."""
    folder, kept = tmp_path / "it", tmp_path / "fingerprints"
    shutil.copytree(FOLDER, folder)
    first = fingerprint_of(folder, kept)
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "_read", None)
        assert fingerprint_of(folder, kept) == first
    file = folder / "model.safetensors"
    before = file.stat()
    with file.open("r+b") as opened:
        opened.seek(before.st_size // 2)
        (byte,) = opened.read(1)
        opened.seek(before.st_size // 2)
        opened.write(bytes([byte ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = fingerprint_of(folder, kept)
    assert changed != first and fingerprint_of(folder, kept) == changed
    (note,) = kept.iterdir()
    note.write_bytes(b"\xff")
    assert fingerprint_of(folder, kept) == changed
    assert fingerprint_of(folder, file) == changed and "could not be kept" in caplog.text
