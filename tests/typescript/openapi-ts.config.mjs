export default {
  input: "./openapi.json",
  output: { path: "./generated", importFileExtension: ".js" },
  plugins: ["@hey-api/client-fetch", "zod", { name: "@hey-api/sdk", validator: true }],
};
