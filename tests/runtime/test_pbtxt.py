"""What is written in protobuf's text format is what protobuf reads."""

from __future__ import annotations

from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

from tests.runtime.triton_schema import model_config, parameters
from thresher.runtime.pbtxt import Name, quoted, text

CONFIG = model_config()
WORDS = st.text(st.characters(exclude_categories=["Cs"]))  # all that UTF-8 can say
SIZES = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4)


@given(WORDS)
def test_a_string_comes_back(word: str) -> None:
    assert quoted(word).isascii()
    assert text_format.Parse(f"backend: {quoted(word)}", CONFIG()).backend == word


@given(
    st.lists(st.tuples(WORDS, SIZES), max_size=3),
    st.dictionaries(WORDS, WORDS, max_size=3),
    st.lists(WORDS, max_size=3),
)
def test_a_message_comes_back(
    tensors: list[tuple[str, list[int]]], settings: dict[str, str], libraries: list[str]
) -> None:
    written = text(
        {
            "input": [{"name": name, "dims": dims, "reshape": {}} for name, dims in tensors],
            "output": [{"name": n, "data_type": Name("TYPE_BF16")} for n, _ in tensors],
            "parameters": [
                {"key": key, "value": {"string_value": value}} for key, value in settings.items()
            ],
            "model_operations": {"op_library_filename": libraries},
        }
    )
    read = text_format.Parse(written, CONFIG())
    assert [(i.name, list(i.dims)) for i in read.input] == tensors
    assert all(i.HasField("reshape") and not i.reshape.shape for i in read.input)
    assert {o.data_type for o in read.output} <= {14}
    assert parameters(read) == settings
    assert list(read.model_operations.op_library_filename) == libraries
