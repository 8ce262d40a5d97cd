"""Models, whose first result is an answer; one file a task, to be read and copied."""

from jlstm.models.classifier import Classifier, ClassifierParams
from jlstm.models.language_model import LanguageModel, LanguageModelParams
from jlstm.models.tagger import Tagger, TaggerParams

__all__ = [
    "Classifier",
    "ClassifierParams",
    "LanguageModel",
    "LanguageModelParams",
    "Tagger",
    "TaggerParams",
]
