"""What training reports to the services: one call after an epoch, one after a fold, one at the end.

They do nothing unless config.py or the environment names a repository (HF_MODEL_REPO_ID) or a project (WANDB_PROJECT),
and never raise: a service that fails costs one line, never the run.
"""

from services import hub, tracking


class Services:
    """The Hub and Weights & Biases, as a context around a training.

    assets_dir: where wandb's files go; paths, run: of the training (checkpoint.Run); data: the Processed data set.
    """

    def __init__(self, assets_dir, paths, data, run):
        self.paths, self.data, self.assets_dir = paths, data, assets_dir
        self.publisher = hub.Publisher(paths)
        self.tracker = tracking.Tracker(assets_dir, {**run.settings, "source": data.info["source"]}, run.run_id)

    def __enter__(self):
        return self

    def start_fold(self, fold):
        self.tracker.start_fold(fold.number, fold.newest["history"] if fold.newest else [])

    def after_epoch(self, fold, row):
        self.tracker.log_epoch(row)
        self.publisher.add_epoch(fold.number, row["epoch"])

    def after_fold(self, fold, scores):
        self.publisher.add_model(fold.number)
        if scores:  # else it has no test
            self.tracker.end_fold(fold, self.paths, scores)

    def at_end(self, results):
        self.tracker.log_summary(results, self.paths.results)
        self.publisher.add_results(results, self.data.clips["slice_file_name"])

    def __exit__(self, kind, *_):
        self.publisher.close(finished=kind is None)
        self.tracker.close(ok=kind is None)


def forget(checkpoint_dir, folds):
    """Remove what waits for the Hub of folds that start again, also where HF_MODEL_REPO_ID is empty this time."""
    hub.forget(checkpoint_dir, folds)
