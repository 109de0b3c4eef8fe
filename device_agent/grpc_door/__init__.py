"""The gRPC door: ``inference.GRPCInferenceService`` of the Open Inference Protocol v2. Needs the extra ``grpc``."""
