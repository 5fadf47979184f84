"""The operators: schemas, checks, fakes, autograd. Importing this package registers the compiled ones, if built."""

from lorun_fast import _native as _native
from lorun_fast.ops import _lora_packed as _lora_packed
from lorun_fast.ops import _lora_triton as _lora_triton
from lorun_fast.ops import _lora_winograd as _lora_winograd
