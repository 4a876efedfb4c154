"""From a volume to heatmaps to picks, for any predictor. Validation and prediction both go through here."""

from czii25d.inference.ensemble import Ensemble, Member, Predictor, View, merge_slabs
from czii25d.inference.options import NMS_RADIUS_FACTOR, InferenceOptions
from czii25d.inference.picking import pick_heatmap, pick_selected, pick_slabs, pick_volume, tiles_of_region
from czii25d.inference.sliding import ArrayVolume, Planes, predict_heatmap, predict_slabs

__all__ = [
    "NMS_RADIUS_FACTOR",
    "ArrayVolume",
    "Ensemble",
    "InferenceOptions",
    "Member",
    "Planes",
    "Predictor",
    "View",
    "merge_slabs",
    "pick_heatmap",
    "pick_selected",
    "pick_slabs",
    "pick_volume",
    "predict_heatmap",
    "predict_slabs",
    "tiles_of_region",
]
