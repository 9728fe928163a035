"""Which features carry a behaviour, and what is left of it without them: attribution, circuits, judges, SHIFT.

```
import circuits
report = circuits.shift(model, {"resid_post.15": sae}, circuits.biographies())
```
"""

from __future__ import annotations

from circuits import behaviours, cues
from circuits.attribution_graphs.attribute import attribution_graph
from circuits.attribution_graphs.coders import CrossLayerTranscoder
from circuits.attribution_graphs.controls import random_coders
from circuits.attribution_graphs.graph import AttributionGraph
from circuits.attribution_graphs.transcoders import load_transcoders
from circuits.classics.direct import DirectAttribution, direct_logit_attribution
from circuits.classics.head_scores import HeadScore, HeadScores, head_scores
from circuits.classics.logit_lens import LogitLens, logit_lens
from circuits.classics.patch_grid import PatchGrid, patch_grid
from circuits.classics.path_patch import PathEffects, path_patch
from circuits.cues.making import with_cues
from circuits.decomposition import bases, heads, mlp_hidden, neurons, pca, random
from circuits.discovery.agreement import Stability
from circuits.discovery.cluster_circuits import ClusterCircuits
from circuits.discovery.clusters import Behaviours, DiscoveryOptions, find_behaviours
from circuits.discovery.finding import ClusterCircuitOptions, circuits_for
from circuits.discovery.samples import SampleOptions, Samples, find_samples
from circuits.discovery.vectors import SampleVectors, VectorOptions, sample_vectors
from circuits.doctor.attribution import Attribution
from circuits.doctor.doctor import DoctorOptions, attribution_doctor, edits_needed
from circuits.doctor.report import Check, DoctorReport
from circuits.edges.attribute import edge_effects
from circuits.edges.tables import Edges, EdgeTable, PrunedCircuit
from circuits.faithful.controls import random_circuit, top_activation_circuit
from circuits.faithful.curves import FaithfulnessCurve, faithfulness_curve
from circuits.faithful.edges import edge_faithfulness
from circuits.faithful.means import TokenMeans, token_means
from circuits.faithful.measure import Faithfulness, faithfulness
from circuits.graph.circuit import Circuit, SiteNodes, load_circuit
from circuits.graph.imports import LoadedGraph, load_graph_json
from circuits.metrics import (
    LogitMetric,
    LossOfMargin,
    Metric,
    SiteMetric,
    kl,
    log_probability,
    logit_difference,
    negative_logit,
    of_logits,
    of_site,
    probe_margin,
)
from circuits.nodes.attribute import node_effects
from circuits.nodes.effects import NodeEffects, SiteEffects
from circuits.nodes.exact import exact_effects, linear_effects
from circuits.nodes.runs import AttributionOptions
from circuits.pairs import Pairs
from circuits.saes.report import TrainedSAEs
from circuits.saes.training import SAEsEstimate, SAETrainingOptions, estimate_saes, train_saes
from circuits.shift.asked import AskedDecider
from circuits.shift.automatic.evidence import ShortcutEvidence
from circuits.shift.automatic.finding import AutomaticOptions
from circuits.shift.automatic.study import AutomaticShift, automatic_shift
from circuits.shift.biographies import BiographyOptions, biographies
from circuits.shift.deciders import (
    DECIDERS,
    Decider,
    FeatureDossier,
    LexiconDecider,
    Node,
    OracleDecider,
    StatisticsDecider,
    TokenContext,
    Verdict,
)
from circuits.shift.export.saving import ShiftClassifier, load_classifier
from circuits.shift.judging.agreement import Agreement, agreement
from circuits.shift.judging.annotated import AnnotatedDecider
from circuits.shift.judging.annotations import Annotation, read_annotations, save_annotations, verdicts_of
from circuits.shift.judging.automatic import AutomaticDecider
from circuits.shift.judging.instability import InstabilityDecider
from circuits.shift.judging.named import judge_named
from circuits.shift.judging.page import QueueCard
from circuits.shift.judging.queue import JudgingQueue, judging_queue
from circuits.shift.judging.within_label import WithinLabelDecider
from circuits.shift.reading import ShiftOptions, read_study
from circuits.shift.removal import RemovalOptions, RemovalScores, scr, tpp
from circuits.shift.shift_report import ShiftReport
from circuits.shift.sources import read_task
from circuits.shift.strength import SplitOptions
from circuits.shift.study import shift
from circuits.shift.task import ShiftTask
from circuits.shift.texts import LabelledTexts
from circuits.shift.toggling.what_if import Backward, BackwardStep, FeatureRole, LeftOut, WhatIf, what_if

__all__ = [
    "what_if",
    "WhatIf",
    "LeftOut",
    "FeatureRole",
    "BackwardStep",
    "Backward",
    "InstabilityDecider",
    "AutomaticDecider",
    "automatic_shift",
    "AutomaticShift",
    "AutomaticOptions",
    "ShortcutEvidence",
    "verdicts_of",
    "TokenContext",
    "WithinLabelDecider",
    "judging_queue",
    "QueueCard",
    "JudgingQueue",
    "judge_named",
    "save_annotations",
    "read_annotations",
    "Annotation",
    "AnnotatedDecider",
    "agreement",
    "Agreement",
    "DECIDERS",
    "AskedDecider",
    "Attribution",
    "AttributionGraph",
    "AttributionOptions",
    "Behaviours",
    "BiographyOptions",
    "Check",
    "Circuit",
    "ClusterCircuitOptions",
    "ClusterCircuits",
    "CrossLayerTranscoder",
    "Decider",
    "DirectAttribution",
    "DiscoveryOptions",
    "DoctorOptions",
    "DoctorReport",
    "EdgeTable",
    "Edges",
    "Faithfulness",
    "FaithfulnessCurve",
    "FeatureDossier",
    "HeadScore",
    "HeadScores",
    "LabelledTexts",
    "LexiconDecider",
    "LoadedGraph",
    "LogitLens",
    "LogitMetric",
    "LossOfMargin",
    "Metric",
    "Node",
    "NodeEffects",
    "OracleDecider",
    "Pairs",
    "PatchGrid",
    "PathEffects",
    "PrunedCircuit",
    "RemovalOptions",
    "RemovalScores",
    "SAETrainingOptions",
    "SAEsEstimate",
    "SampleOptions",
    "SampleVectors",
    "Samples",
    "ShiftClassifier",
    "ShiftOptions",
    "ShiftReport",
    "ShiftTask",
    "SiteEffects",
    "SiteMetric",
    "SiteNodes",
    "SplitOptions",
    "Stability",
    "StatisticsDecider",
    "TokenMeans",
    "TrainedSAEs",
    "VectorOptions",
    "Verdict",
    "attribution_doctor",
    "attribution_graph",
    "bases",
    "behaviours",
    "biographies",
    "circuits_for",
    "cues",
    "direct_logit_attribution",
    "edge_effects",
    "edge_faithfulness",
    "edits_needed",
    "estimate_saes",
    "exact_effects",
    "faithfulness",
    "faithfulness_curve",
    "find_behaviours",
    "find_samples",
    "head_scores",
    "heads",
    "kl",
    "linear_effects",
    "load_circuit",
    "load_classifier",
    "load_transcoders",
    "load_graph_json",
    "log_probability",
    "logit_difference",
    "logit_lens",
    "mlp_hidden",
    "negative_logit",
    "neurons",
    "node_effects",
    "of_logits",
    "of_site",
    "patch_grid",
    "path_patch",
    "pca",
    "probe_margin",
    "random",
    "random_circuit",
    "random_coders",
    "read_study",
    "read_task",
    "sample_vectors",
    "scr",
    "shift",
    "token_means",
    "top_activation_circuit",
    "tpp",
    "train_saes",
    "with_cues",
]
