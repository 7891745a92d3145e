"""Families that cannot be pruned: their decoders attend in ways that the pruned loop has no masks for."""

from __future__ import annotations

from llava.families.base import Family


class Gemma3(Family):
    name = "gemma3"
    classes = ("Gemma3ForConditionalGeneration", "Gemma3Model")
    refused = "image tokens that attend to one another in both directions, and sliding windows in most layers"


class PaliGemma(Family):
    name = "paligemma"
    classes = ("PaliGemmaForConditionalGeneration", "PaliGemmaModel")
    refused = "a prefix of image and question that attends in both directions"
