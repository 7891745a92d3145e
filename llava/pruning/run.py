"""A pruning run: a method attached to a model, for as long as the context lasts.

The run replaces the forward of the decoder instance, hears from the model where the visual tokens are, and collects the
traces. On exit the decoder has its own forward again.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llava import compat
from llava.pruning.base import PruningMethod
from llava.pruning.cache import CacheRecord
from llava.pruning.decoder import Prompt, decode, dense_traces, prefill
from llava.pruning.layout import VisualLayout
from llava.pruning.trace import Trace

_RUN_ATTRIBUTE = "pruning_run"


class PruningRun:
    """Context manager that prunes inside ``model``; build it with ``method.attach(model)``.

    Attributes:
        method: the attached method.
        traces: one :class:`Trace` per sample per prefill, in order; may be cleared at any time.
        samples_seen: running number of the next sample; set it to continue an earlier run (seeded methods use it).
    """

    def __init__(self, method: PruningMethod, model: nn.Module) -> None:
        self.method = method
        self.decoder = compat.find_decoder(model)
        self.traces: list[Trace] = []
        self._stages = method.stages(len(self.decoder.layers))
        self._layout: VisualLayout | None = None
        self._cls: list[Tensor] | None = None
        self.samples_seen = 0
        self._given_ids: tuple[int, ...] | None = None
        self._seconds: list[float] = []
        self._unread: list[_Stopwatch] = []
        self._model = model

    def __enter__(self) -> PruningRun:
        if getattr(self.decoder, _RUN_ATTRIBUTE, None) is not None:
            raise RuntimeError("a pruning run is already attached to this model; leave its context first")
        config = getattr(self._model, "generation_config", None)
        if self._prunes and getattr(config, "prefill_chunk_size", None):
            raise ValueError("generation_config.prefill_chunk_size is set: chunked prefill cannot be pruned")
        self._own_forward = self.decoder.__dict__.get("forward")
        self._dense_forward = self.decoder.forward

        @functools.wraps(self._dense_forward)  # the signature must survive: others look at it
        def forward(*args, **kwargs):
            return self._forward(*args, **kwargs)

        self.decoder.forward = forward
        self.decoder.pruning_run = self
        return self

    def __exit__(self, *exc) -> None:
        del self.decoder.pruning_run
        if self._own_forward is None:
            del self.decoder.forward
        else:
            self.decoder.forward = self._own_forward

    @property
    def selects(self) -> bool:
        """Whether the method drops or merges tokens anywhere; a dense run with a cap does not count."""
        return bool(self._stages)

    @property
    def needs_cls_attention(self) -> bool:
        """Whether the model has to provide CLS attention with :meth:`set_visual`."""
        return self.method.needs_cls or self.method.visual_token_num is not None

    @property
    def prefill_seconds(self) -> list[float]:
        """Wall-clock seconds of every decoder prefill, selection included; reading it waits for the device."""
        self._seconds.extend(watch.seconds() for watch in self._unread)
        self._unread.clear()
        return self._seconds

    def set_visual(
        self,
        layout: VisualLayout,
        cls_attention: Tensor | Sequence[Tensor | None] | None = None,
        sample_ids: Sequence[int] | None = None,
    ) -> None:
        """Say where the visual tokens of the next prompts are; holds until it is set again.

        Args:
            layout: spans in the (left-padded) sequence given to the decoder, one row per sample; rows are repeated for
                beams.
            cls_attention: one vector ``[N_i]`` per row (None for rows without visual tokens), or a tensor ``[N]`` or
                ``[B, N]``. Needed if :attr:`needs_cls_attention`.
            sample_ids: number of each row's sample, for seeded methods; default: counted on from :attr:`samples_seen`.

        Raises:
            ValueError: CLS attention missing or of the wrong length.
        """
        vectors = None
        if self.needs_cls_attention:
            if cls_attention is None:
                if any(layout.counts):
                    raise ValueError(f"method '{self.method.name}' needs cls_attention with set_visual")
                cls_attention = [None] * layout.batch_size
            if isinstance(cls_attention, Tensor) and cls_attention.ndim == 1:
                cls_attention = cls_attention[None]
            empty = torch.zeros(0)
            vectors = [empty if vector is None else vector.detach().float() for vector in cls_attention]
            if tuple(len(vector) for vector in vectors) != layout.counts:
                raise ValueError(
                    f"cls_attention has {[len(vector) for vector in vectors]} values, the layout has "
                    f"{list(layout.counts)} visual tokens"
                )
        if sample_ids is not None and len(sample_ids) != layout.batch_size:
            raise ValueError(f"{len(sample_ids)} sample_ids for a layout of {layout.batch_size} rows")
        self._layout, self._cls = layout, vectors
        self._given_ids = None if sample_ids is None else tuple(sample_ids)

    @property
    def _prunes(self) -> bool:
        return bool(self._stages) or self.method.visual_token_num is not None

    def _forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        def dense():
            return self._dense_forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )

        continues = compat.cached_length(past_key_values) > 0
        if continues and CacheRecord.of(past_key_values) is None:
            return dense()  # nothing was pruned from this cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("the decoder needs exactly one of input_ids and inputs_embeds")
        if self._prunes or continues:
            self._refuse(kwargs)
        # What the stock forward takes out of its keyword arguments before they reach the layers.
        own = {name: kwargs[name] for name in ("output_hidden_states", "return_dict") if name in kwargs}
        layer_kwargs = {name: value for name, value in kwargs.items() if name not in own}
        keep_states = bool(own.get("output_hidden_states"))

        def embed() -> Tensor:
            return self.decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

        if continues:
            last, states = decode(self.decoder, embed(), past_key_values, keep_states, **layer_kwargs)
            return self._output(last, past_key_values, states, own.get("return_dict"))

        given = input_ids if inputs_embeds is None else inputs_embeds
        layout, repeats = self._layout_for(len(given))
        lengths = layout.lengths or _row_lengths(attention_mask, *given.shape[:2])
        with _Stopwatch(given.device) as watch:
            if not self._prunes or not any(layout.counts):
                result = dense()
                traces = dense_traces(self.decoder, layout, lengths, result[0].element_size())
            else:
                cache = compat.new_cache() if past_key_values is None else past_key_values
                compat.check_cache(cache)
                cls = self._padded_cls(given.device, repeats)
                prompt = Prompt(embed(), lengths, position_ids, layout, cls, self._sample_ids(repeats))
                pruned = prefill(self.decoder, self.method, prompt, cache, keep_states, **layer_kwargs)
                traces = pruned.traces
                cached = cache if use_cache or past_key_values is not None or use_cache is None else None
                result = self._output(pruned.hidden_BNC, cached, pruned.hidden_states, own.get("return_dict"))
        self._unread.append(watch)
        self.samples_seen += layout.batch_size // repeats
        self.traces.extend(traces[::repeats])
        return result

    def _refuse(self, kwargs: dict) -> None:
        if self.decoder.training:
            raise ValueError("visual token pruning is for inference: call model.eval() first")
        if kwargs.get("output_attentions"):
            raise ValueError(
                "output_attentions is not available with pruning: no full attention map is ever computed; the traces "
                "say which tokens survive"
            )

    def _layout_for(self, batch: int) -> tuple[VisualLayout, int]:
        if self._layout is None:
            raise RuntimeError(
                "the pruning run does not know where the visual tokens are: call run.set_visual(VisualLayout...) "
                "before the prefill (LlavaLlamaForCausalLM does so itself)"
            )
        if batch % self._layout.batch_size:
            raise ValueError(
                f"the visual layout has {self._layout.batch_size} rows but the batch has {batch}; call set_visual for "
                "each batch"
            )
        repeats = batch // self._layout.batch_size
        return self._layout.expand(repeats) if repeats > 1 else self._layout, repeats

    def _padded_cls(self, device: torch.device, repeats: int) -> Tensor | None:
        if self._cls is None:
            return None
        padded = nn.utils.rnn.pad_sequence([vector.to(device) for vector in self._cls], batch_first=True)
        return padded.repeat_interleave(repeats, dim=0)

    def _sample_ids(self, repeats: int) -> tuple[int, ...]:
        first = self.samples_seen
        ids = self._given_ids or range(first, first + self._layout.batch_size)
        return tuple(number for number in ids for _ in range(repeats))

    @staticmethod
    def _output(hidden: Tensor, cache, states, return_dict: bool | None):
        output = compat.BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache, hidden_states=states)
        return output.to_tuple() if return_dict is False else output


def _row_lengths(attention_mask: Tensor | None, batch: int, width: int) -> tuple[int, ...]:
    """Real tokens per row of a left-padded batch.

    Raises:
        ValueError: the mask is not a left-padding mask.
    """
    if attention_mask is None:
        return (width,) * batch
    if attention_mask.ndim != 2 or attention_mask.shape[1] != width:
        raise ValueError(f"attention_mask must be [batch, {width}] for a prefill, got {tuple(attention_mask.shape)}")
    real = attention_mask.bool()
    # One transfer for both questions: how long the rows are, and whether a hole follows a real token.
    lengths, holes = torch.stack((real.sum(1), (real[:, :-1] & ~real[:, 1:]).sum(1))).tolist()
    if any(holes) or min(lengths) == 0:
        raise ValueError("attention_mask must mark left padding only: zeros, then ones up to the end of each row")
    return tuple(lengths)


class _Stopwatch:
    """Times a block: the host clock on CPU, a pair of events on CUDA that nobody waits for until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.events = None
        if device.type == "cuda":
            self.events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __enter__(self) -> _Stopwatch:
        if self.events:
            self.events[0].record()
        else:
            self.started = time.perf_counter()
        return self

    def __exit__(self, *exc) -> None:
        if self.events:
            self.events[1].record()
        else:
            self.elapsed = time.perf_counter() - self.started

    def seconds(self) -> float:
        if not self.events:
            return self.elapsed
        start, end = self.events
        end.synchronize()
        return start.elapsed_time(end) / 1000
