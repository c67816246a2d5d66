from lit_rlft.algorithms.adjoint_matching import AdjointMatching as AdjointMatching
from lit_rlft.algorithms.base import RewardFineTuner as RewardFineTuner
from lit_rlft.algorithms.ddpo import DDPO as DDPO
from lit_rlft.algorithms.dpo import DiffusionDPO as DiffusionDPO
from lit_rlft.algorithms.graft import GRAFT as GRAFT
from lit_rlft.algorithms.graft import PGRAFT as PGRAFT
from lit_rlft.algorithms.inverse_noise_correction import (
    InverseNoiseCorrection as InverseNoiseCorrection,
)
from lit_rlft.algorithms.nft import DiffusionNFT as DiffusionNFT
from lit_rlft.algorithms.noise_ppo import NoisePPO as NoisePPO
from lit_rlft.algorithms.pretrain import Pretrain as Pretrain
from lit_rlft.algorithms.reward_gradient import RewardGradient as RewardGradient
from lit_rlft.callbacks.cost_meter import CostMeter as CostMeter
from lit_rlft.callbacks.ema import EMA as EMA
from lit_rlft.callbacks.last_checkpoint import LastCheckpoint as LastCheckpoint
from lit_rlft.callbacks.run_files import RunFiles as RunFiles
from lit_rlft.callbacks.sample_panel import SamplePanel as SamplePanel
from lit_rlft.callbacks.self_check import SelfCheck as SelfCheck
from lit_rlft.core.advantage import BatchAdvantage as BatchAdvantage
from lit_rlft.core.advantage import GroupAdvantage as GroupAdvantage
from lit_rlft.core.advantage import LeaveOneOutAdvantage as LeaveOneOutAdvantage
from lit_rlft.core.advantage import RunningAdvantage as RunningAdvantage
from lit_rlft.core.checks import UsageError as UsageError
from lit_rlft.core.gradient_plan import AlignProp as AlignProp
from lit_rlft.core.gradient_plan import DRaFT as DRaFT
from lit_rlft.core.gradient_plan import DRaFTLV as DRaFTLV
from lit_rlft.core.gradient_plan import DRTune as DRTune
from lit_rlft.core.gradient_plan import ReFL as ReFL
from lit_rlft.core.pipeline import Condition as Condition
from lit_rlft.core.pipeline import Pipeline as Pipeline
from lit_rlft.core.reward import Metric as Metric
from lit_rlft.core.reward import Metrics as Metrics
from lit_rlft.core.reward import Product as Product
from lit_rlft.core.reward import Reward as Reward
from lit_rlft.core.reward import SetMetric as SetMetric
from lit_rlft.core.reward import WeightedSum as WeightedSum
from lit_rlft.core.sampling import Sampler as Sampler
from lit_rlft.core.selection import BestOfM as BestOfM
from lit_rlft.core.selection import Classical as Classical
from lit_rlft.core.selection import Preference as Preference
from lit_rlft.core.selection import RandomK as RandomK
from lit_rlft.core.selection import Threshold as Threshold
from lit_rlft.core.selection import TopK as TopK
from lit_rlft.core.selection import Unique as Unique
from lit_rlft.core.window import SlidingWindow as SlidingWindow
from lit_rlft.inference import NoiseGenerator as NoiseGenerator
from lit_rlft.kit.data import SplitData as SplitData
from lit_rlft.loop.reference import LoRA as LoRA
from lit_rlft.loop.side.rewards import RewardWorkers as RewardWorkers

__version__: str
