// An HTTP server on Node.js. argv: port. Any path: its tag and its method's body length, kept alive.
import http from 'node:http'
const server = http.createServer((request, response) => {
  let length = 0
  request.on('data', (data) => { length += data.length })
  request.on('end', () => {
    const body = request.method === 'POST' ? String(length) : 'x'.repeat(Number(request.url.split('/')[2] || 2))
    response.writeHead(200, { 'Content-Length': Buffer.byteLength(body), 'X-Tag': request.url.split('/').pop() })
    response.end(body)
  })
})
server.keepAliveTimeout = 60000
server.listen(Number(process.argv[2]), '::')
