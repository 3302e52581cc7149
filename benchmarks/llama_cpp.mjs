// Greedy answers of llama.cpp, for llama_cpp.py.
//
// Arguments: a GGUF file, a JSON file of {"texts": […], "ids": [[…], …]}, the number of tokens.
// Prints one JSON object: `answers`, token ids with the ending token where there is one, and
// `tokenized`, its own token ids of each text.
import { readFileSync } from "node:fs";
import { loadModel } from "./llama_cpp_model.mjs";

const [modelPath, promptsPath, numTokens] = process.argv.slice(2);
const { texts, ids } = JSON.parse(readFileSync(promptsPath, "utf8"));
const model = await loadModel(modelPath, 1);
const context = await model.createContext({
  contextSize: 4096,
  threads: 1, // they spin: two beside other work are slower than one
  flashAttention: false,
  experimentalKvCacheKeyType: "F32", // as exact as it goes: the default rounds to 16 bits
  experimentalKvCacheValueType: "F32",
});
const sequence = context.getSequence();
const answers = [];
for (const prompt of ids) {
  await sequence.clearHistory();
  const answer = [];
  for await (const token of sequence.evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
    answer.push(token);
    if (model.isEogToken(token) || answer.length >= Number(numTokens)) break;
  }
  answers.push(answer);
}
const tokenized = texts.map((text) => model.tokenize(text, true));
console.log(JSON.stringify({ answers, tokenized }));
await llama.dispose();
