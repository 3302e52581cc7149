// A model in llama.cpp, on the CPU, for the programs beside this one.
import { getLlama } from "node-llama-cpp";

export async function loadModel(modelPath, threads) {
  const llama = await getLlama({
    gpu: false,
    build: "never",
    progressLogs: false,
    logLevel: "error",
    maxThreads: threads,
  });
  return llama.loadModel({ modelPath });
}
