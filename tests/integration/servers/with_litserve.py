"""A LitServe server of an ONNX file: `python with_litserve.py FILE PORT`."""

import sys

import litserve
import numpy as np
import onnxruntime


class Api(litserve.LitAPI):
    def setup(self, device):
        self.session = onnxruntime.InferenceSession(sys.argv[1])

    def decode_request(self, request):
        return np.asarray(request["images"], np.float32)

    def predict(self, x):
        return self.session.run(None, {"images": x})[0]

    def encode_response(self, output):
        return {"scores": output.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(Api(), accelerator="cpu")
    server.run(host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False)
