// llama.cpp behind a thin HTTP loop, for serve.py: streams of chat completions, and nothing else.
//
// Arguments: a GGUF file, the number of threads, of sequences, and what stands before and after a
// question in a prompt, as a JSON list of two texts. Prints its port. The sequences share one
// context, so that those that are asked at the same time are computed in one batch; a request waits
// for one that is free. Answers are greedy.
import { createServer } from "node:http";
import { loadModel } from "./llama_cpp_model.mjs";

const [modelPath, threads, number, around] = process.argv.slice(2);
const [before, after] = JSON.parse(around);
const model = await loadModel(modelPath, Number(threads));
const context = await model.createContext({
  contextSize: 512, // tokens of a sequence
  sequences: Number(number),
  threads: Number(threads),
});
const free = Array.from({ length: Number(number) }, () => context.getSequence());
const waiting = [];

async function answer(body, response) {
  const sequence = free.pop() ?? (await new Promise((resolve) => waiting.push(resolve)));
  try {
    await sequence.clearHistory();
    const prompt = model.tokenize(before + body.messages[0].content + after, true);
    let count = 0;
    for await (const token of sequence.evaluate(prompt, { temperature: 0 })) {
      if (response.destroyed) return;
      const content = model.detokenize([token]);
      response.write(`data: {"choices":[{"delta":{"content":${JSON.stringify(content)}}}]}\n\n`);
      if (++count >= body.max_tokens) break;
    }
    response.end("data: [DONE]\n\n");
  } finally {
    const next = waiting.shift();
    if (next) next(sequence);
    else free.push(sequence);
  }
}

const server = createServer(async (request, response) => {
  const pieces = [];
  for await (const piece of request) pieces.push(piece);
  response.writeHead(200, { "Content-Type": "text/event-stream" });
  await answer(JSON.parse(Buffer.concat(pieces).toString()), response);
});
server.listen(0, "127.0.0.1", () => console.log(`ready at ${server.address().port}`));
