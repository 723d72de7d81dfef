"""The MLflow model of an ONNX file, as code."""

import mlflow
import numpy as np
import onnxruntime


class Model(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.session = onnxruntime.InferenceSession(context.artifacts["onnx"])

    def predict(self, context, model_input, params=None):
        return self.session.run(None, {"images": np.asarray(model_input, np.float32)})[0].tolist()


mlflow.models.set_model(Model())
