"""The protobuf forms against the SDK's own converters, both ways."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tinker import types
from tinker.proto import tinker_public_pb2 as pb
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import deserialize_proto_response

from tinkercloud.api.wire.body import Unreadable
from tinkercloud.api.wire.protobuf import batch_from, encode_loss, encode_sample, parse_forward_backward
from tinkercloud.control.stability import Provenance, Span
from tinkercloud.engine.operations import Matrix
from tinkercloud.engine.results import AltTokens, LossOutput, SampledSequence, SampleOutput, TopLogprobs
from tinkercloud.errors import InvalidRequest

DENSE_BYTES = 2**20
ids = st.integers(0, 2**31 - 1)
floats = hnp.arrays(np.float32, st.integers(1, 20), elements=st.floats(width=32, allow_nan=False))


def sent(data, loss_fn="cross_entropy", config=None, forward_only=False) -> pb.ForwardBackwardRequest:
    """What arrives of a request that the SDK writes."""
    batch = types.ForwardBackwardInput(data=data, loss_fn=loss_fn, loss_fn_config=config)
    message = forward_backward_request_to_proto(types.ForwardBackwardRequest(batch, model_id="m:train:0", seq_id=7))
    message.forward_only = forward_only
    return parse_forward_backward(message.SerializeToString())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(ids, min_size=1, max_size=9), min_size=1, max_size=3), floats)
def test_tokens_and_dense_inputs_arrive_as_they_were(chunks, weights):
    model_input = types.ModelInput(chunks=[types.EncodedTextChunk(tokens=chunk) for chunk in chunks])
    targets = np.arange(len(weights), dtype=np.int64) - 1
    message = sent([types.Datum(model_input, {"target_tokens": targets, "weights": weights})])
    batch = batch_from(message, DENSE_BYTES)
    assert (message.model_id, message.seq_id) == ("m:train:0", 7)
    assert batch.loss_fn == "cross_entropy"
    (datum,) = batch.data
    assert datum.tokens.dtype == np.int32 and datum.tokens.tolist() == [t for chunk in chunks for t in chunk]
    assert datum.inputs["target_tokens"].dtype == np.int64
    np.testing.assert_array_equal(datum.inputs["target_tokens"], targets)
    assert datum.inputs["weights"].dtype == np.float32
    np.testing.assert_array_equal(datum.inputs["weights"], weights)


SPANS = {
    "model_input": [
        types.PromptProvenanceSpan(sequence_id="a", length=2),
        types.SampledProvenanceSpan(sequence_id="a", length=0),
    ],
    "loss_fn_inputs": [
        types.PromptProvenanceSpan(sequence_id="a", offset=1, length=1),
        types.SampledProvenanceSpan(sequence_id="b", offset=7, length=1),
    ],
}
PROVENANCE = Provenance(
    model_input=(Span("a", 0, 2, sampled=False), Span("a", 0, 0, sampled=True)),
    targets=(Span("a", 1, 1, sampled=False), Span("b", 7, 1, sampled=True)),
)


def test_spans_arrive_as_they_were():
    plain = types.Datum(types.ModelInput.from_ints([1, 2]), {"target_tokens": np.array([2, 3])})
    message = sent([plain, plain.with_provenance(**SPANS)], "stable_reinforce", {"kl_coeff": 0.25})
    batch = batch_from(message, DENSE_BYTES)
    assert batch.provenance == [None, PROVENANCE]
    assert batch.loss_fn_config == {"kl_coeff": 0.25}
    message.data[1].loss_fn_input_spans.add()
    with pytest.raises(InvalidRequest, match="datum 1, loss_fn_input_spans: a span has neither prompt_tokens nor"):
        batch_from(message, DENSE_BYTES)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_sparse_inputs_become_what_torch_makes_of_them(rows, columns, density, seed):
    draw = np.random.default_rng(seed)
    dense = np.where(draw.random((rows, columns)) < density, draw.integers(1, 99, (rows, columns)), 0)
    inputs = {"target_tokens": torch.from_numpy(dense), "weights": torch.from_numpy(dense.astype(np.float32))}
    batch = batch_from(sent([types.Datum(types.ModelInput.from_ints([1] * rows), inputs)]), DENSE_BYTES)
    for name, kind in (("target_tokens", np.int64), ("weights", np.float32)):
        assert batch.data[0].inputs[name].dtype == kind
        np.testing.assert_array_equal(batch.data[0].inputs[name], dense)


def test_config_comes_as_numbers_and_texts():
    datum = types.Datum(types.ModelInput.from_ints([1]), {"target_tokens": [1]})
    batch = batch_from(sent([datum], "ppo", {"clip_low_threshold": 0.7, "variant": "x"}), DENSE_BYTES)
    assert batch.loss_fn_config == {"clip_low_threshold": 0.7, "variant": "x"}


def test_bfloat16_is_widened():
    values = torch.tensor([1.5, -2.0, 3.140625])
    message = sent([types.Datum(types.ModelInput.from_ints([1, 2, 3]), {"weights": values.numpy()})])
    tensor = message.data[0].loss_fn_inputs["weights"]
    tensor.dtype = pb.DTYPE_BFLOAT16
    tensor.dense = values.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    assert batch_from(message, DENSE_BYTES).data[0].inputs["weights"].tolist() == values.tolist()


def tensor(dtype=pb.DTYPE_FLOAT32, dense=None, shape=(), csr=None) -> pb.Tensor:
    made = pb.Tensor(dtype=dtype, shape=shape)
    if csr is None:
        made.dense = np.zeros(4, np.float32).tobytes() if dense is None else dense
    else:
        values, crow, col = csr
        made.sparse_csr.values = np.array(values, np.float32).tobytes()
        made.sparse_csr.crow_indices = np.array(crow, np.int64).tobytes()
        made.sparse_csr.col_indices = np.array(col, np.int64).tobytes()
    return made


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (tensor(dense=b"1234567"), "7 bytes are not a whole number of 4-byte float32"),
        (tensor(shape=(5,)), r"shape \[5\] does not fit its 4 values"),
        (tensor(shape=(-2, -2)), r"shape \[-2, -2\] does not fit"),
        (tensor(dtype=pb.DTYPE_UNSPECIFIED), "dtype 0 is unknown"),
        (tensor(dtype=9), "dtype 9 is unknown"),
        (tensor(csr=([1], [0, 1], [0])), r"needs a shape \[rows, columns\]"),
        (tensor(shape=(1, -1), csr=([], [0, 0], [])), r"needs a shape \[rows, columns\]"),
        (tensor(shape=(2, 3), csr=([1], [0, 1], [0])), "sparse_crow_indices must be 3 ascending"),
        (tensor(shape=(2, 3), csr=([1], [0, 2, 1], [0])), "sparse_crow_indices must be 3 ascending"),
        (tensor(shape=(2, 3), csr=([1], [0, 0, 2], [0])), "from 0 to its 1 values"),
        (tensor(shape=(1, 3), csr=([1], [0, 1], [3])), "sparse_col_indices must be 1 columns"),
        (tensor(shape=(1, 3), csr=([1], [0, 1], [-1])), "from 0 to 2"),
        (tensor(shape=(1, 3), csr=([1, 2], [0, 2], [1, 1])), "must ascend, each once"),
        (tensor(shape=(1, 2**40), csr=([], [0, 0], [])), "are more than 1048576 bytes when dense"),
    ],
)
def test_a_broken_tensor_is_named(wrong, says):
    message = pb.ForwardBackwardRequest()
    message.data.add()
    message.data.add().loss_fn_inputs["weights"].CopyFrom(wrong)
    with pytest.raises(InvalidRequest, match=f"datum 1, weights: .*{says}"):
        batch_from(message, DENSE_BYTES)


def test_the_bytes_of_sparse_tensors_are_counted_over_the_whole_request():
    message = pb.ForwardBackwardRequest()
    for _ in range(3):
        message.data.add().loss_fn_inputs["weights"].CopyFrom(tensor(shape=(1, 2**17), csr=([], [0, 0], [])))
    with pytest.raises(InvalidRequest, match="datum 2, weights"):
        batch_from(message, DENSE_BYTES)


def test_other_than_text_is_refused_by_name():
    message = pb.ForwardBackwardRequest()
    message.data.add().model_input.add().image.format = "png"
    with pytest.raises(InvalidRequest, match="datum 0: model_input has a chunk of image; this server takes text only"):
        batch_from(message, DENSE_BYTES)


def test_something_else_than_the_message_is_unreadable():
    with pytest.raises(Unreadable) as caught:
        parse_forward_backward(b'{"model_id": "m"}')
    assert caught.value.address is None


def test_a_message_that_is_cut_short_still_says_whose_it_is():
    datum = types.Datum(types.ModelInput.from_ints([1] * 99), {"target_tokens": [1] * 99})
    whole = sent([datum]).SerializeToString()
    with pytest.raises(Unreadable) as caught:
        parse_forward_backward(whole[: len(whole) // 2])
    assert caught.value.address == ("m:train:0", 7)


# ---------------------------------------------------------------- results


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from([None, 1, 3])), max_size=6), st.integers(0, 99))
def test_the_sdk_reads_losses_of_any_mixture_of_shapes(shapes, seed):
    draw = np.random.default_rng(seed)
    outputs = tuple(
        {
            name: draw.standard_normal((rows,) if columns is None else (rows, columns)).astype(np.float32)
            for name in ("logprobs", "elementwise_loss")
        }
        for rows, columns in shapes
    )
    result = LossOutput(output_type="CrossEntropyLossReturn", outputs=outputs, metrics={"loss:sum": 1.25})
    read = deserialize_proto_response(encode_loss(result), types.ForwardBackwardOutput)
    assert read.loss_fn_output_type == "CrossEntropyLossReturn"
    assert read.metrics == {"loss:sum": 1.25}
    assert len(read.loss_fn_outputs) == len(outputs)
    for got, put in zip(read.loss_fn_outputs, outputs, strict=True):
        assert got.keys() == put.keys()
        for name, array in put.items():
            np.testing.assert_array_equal(got[name].to_numpy(), array)


ALTERNATIVES = AltTokens(np.array([[7, 8]], np.int32), np.array([[-2.5, -3.5]], np.float32))


def sampled(top: bool = True) -> SampleOutput:
    tops = TopLogprobs(np.array([[0, 0], [5, 6]], np.int32), np.array([[-99999, -99999], [-0.5, -1.5]], np.float32))
    return SampleOutput(
        sequences=(
            SampledSequence(
                np.array([3, 4], np.int32), np.array([-0.25, -2.0], np.float32), "stop", tops if top else None
            ),
            SampledSequence(np.array([9], np.int32), np.array([-1.0], np.float32), "length"),
        ),
        prompt_logprobs=np.array([np.nan, -3.5], np.float32),
        prompt_top_logprobs=tops if top else None,
        prompt_cache_hit_tokens=16,
        target_prompt_logprobs=Matrix(np.array([-1.5, 0], np.float32), (1, 2)) if top else None,
        prompt_alt_tokens=ALTERNATIVES if top else None,
    )


def test_the_sdk_reads_samples():
    read = deserialize_proto_response(encode_sample(sampled()), types.SampleResponse)
    first, second = read.sequences
    assert (first.tokens, first.logprobs, first.stop_reason) == ([3, 4], [-0.25, -2.0], "stop")
    assert first.topk_logprobs == [None, [(5, -0.5), (6, -1.5)]]
    assert (second.tokens, second.stop_reason, second.topk_logprobs) == ([9], "length", None)
    assert read.prompt_logprobs == [None, -3.5]
    assert read.topk_prompt_logprobs == [None, [(5, -0.5), (6, -1.5)]]
    assert read.prompt_cache_hit_tokens == 16
    assert read.target_prompt_logprobs.dtype == "float32" and read.target_prompt_logprobs.tolist() == [[-1.5, 0]]
    assert read.prompt_alt_tokens.tokens.dtype == "int64" and read.prompt_alt_tokens.tokens.tolist() == [[7, 8]]
    assert read.prompt_alt_tokens.logprobs.tolist() == [[-2.5, -3.5]]


SPARSE = Matrix(np.array([-1, -2, -3], np.float32), (3, 9), np.array([0, 0, 1, 3]), np.array([4, 0, 8]))
NONE = AltTokens(np.zeros((0, 2), np.int32), np.zeros((0, 2), np.float32))


def test_the_sdk_reads_sparse_targets_and_the_alternatives_of_a_single_token():
    result = SampleOutput(sequences=sampled().sequences, target_prompt_logprobs=SPARSE, prompt_alt_tokens=NONE)
    read = deserialize_proto_response(encode_sample(result), types.SampleResponse)
    tensor = read.target_prompt_logprobs
    assert (tensor.sparse_crow_indices, tensor.sparse_col_indices) == ([0, 0, 1, 3], [4, 0, 8])
    expected = np.zeros((3, 9))
    expected[1, 4], expected[2, 0], expected[2, 8] = -1, -2, -3
    np.testing.assert_array_equal(tensor.to_numpy(), expected)
    assert read.prompt_alt_tokens.tokens.shape == read.prompt_alt_tokens.logprobs.shape == [0, 2]


def test_what_was_not_asked_for_is_absent():
    plain = SampleOutput(sequences=sampled(top=False).sequences)
    read = deserialize_proto_response(encode_sample(plain), types.SampleResponse)
    assert read.prompt_logprobs is None and read.topk_prompt_logprobs is None
    assert read.target_prompt_logprobs is None and read.prompt_alt_tokens is None
