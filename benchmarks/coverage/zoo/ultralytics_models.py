"""YOLO networks of ultralytics, from their YAML descriptions."""

from __future__ import annotations

from torch import nn

from benchmarks.coverage.zoo.entry import Entry, images, member

_TASKS = {
    "DetectionModel": "yolov3-tiny yolov5n yolov6n yolov8n yolov9t yolov10n yolo11n yolo12n yolov8n-ghost yolov8n-p2",
    "SegmentationModel": "yolov8n-seg yolo11n-seg",
    "PoseModel": "yolo11n-pose",
    "OBBModel": "yolo11n-obb",
    "ClassificationModel": "yolov8n-cls yolo11n-cls",
}


def _entry(task: str, name: str) -> Entry:
    def build() -> nn.Module:
        model: nn.Module = member("ultralytics", f"nn.tasks.{task}")(f"{name}.yaml", verbose=False)
        return model

    return Entry(f"ultralytics/{name}", "ultralytics", build, images(64))


ENTRIES = [_entry(task, name) for task, names in _TASKS.items() for name in names.split()]
