"""Every setting of the library: frozen, typed dataclasses, validated when they are made.

A run is a function in ``gbla_rec/recipes.py`` that returns a ``RunConfig``; the command line overrides single fields.
"""

from gbla_rec.config.byte_size import exact_bytes as exact_bytes
from gbla_rec.config.byte_size import format_bytes as format_bytes
from gbla_rec.config.byte_size import parse_bytes as parse_bytes
from gbla_rec.config.data import Cuts as Cuts
from gbla_rec.config.data import PrepareConfig as PrepareConfig
from gbla_rec.config.data import SplitConfig as SplitConfig
from gbla_rec.config.data import SplitKind as SplitKind
from gbla_rec.config.data import StreamConfig as StreamConfig
from gbla_rec.config.data import TieRule as TieRule
from gbla_rec.config.evaluation import EvaluationConfig as EvaluationConfig
from gbla_rec.config.item_head import ItemHeadConfig as ItemHeadConfig
from gbla_rec.config.item_head import ItemLoss as ItemLoss
from gbla_rec.config.json_form import ConfigT as ConfigT
from gbla_rec.config.json_form import differing_fields as differing_fields
from gbla_rec.config.json_form import from_json as from_json
from gbla_rec.config.json_form import to_json as to_json
from gbla_rec.config.json_form import with_defaults as with_defaults
from gbla_rec.config.model import PATTERN_LETTERS as PATTERN_LETTERS
from gbla_rec.config.model import Communication as Communication
from gbla_rec.config.model import DecoderConfig as DecoderConfig
from gbla_rec.config.model import Direction as Direction
from gbla_rec.config.model import EmbeddingConfig as EmbeddingConfig
from gbla_rec.config.model import EncoderConfig as EncoderConfig
from gbla_rec.config.model import FeatureMap as FeatureMap
from gbla_rec.config.model import Kernels as Kernels
from gbla_rec.config.model import ModelConfig as ModelConfig
from gbla_rec.config.model import Objective as Objective
from gbla_rec.config.model import Placement as Placement
from gbla_rec.config.model import Sharding as Sharding
from gbla_rec.config.model import Tokens as Tokens
from gbla_rec.config.multiply_adds import BatchSizes as BatchSizes
from gbla_rec.config.multiply_adds import MultiplyAdds as MultiplyAdds
from gbla_rec.config.multiply_adds import forward_multiply_adds as forward_multiply_adds
from gbla_rec.config.multiply_adds import multiply_adds as multiply_adds
from gbla_rec.config.multiply_adds import with_sample_costs as with_sample_costs
from gbla_rec.config.run import RunConfig as RunConfig
from gbla_rec.config.semantic_ids import EmbeddingSource as EmbeddingSource
from gbla_rec.config.semantic_ids import SemanticIdConfig as SemanticIdConfig
from gbla_rec.config.training import OptimizerConfig as OptimizerConfig
from gbla_rec.config.training import TrainingConfig as TrainingConfig
