// Requests on 4 kept connections of Node.js. argv: host port count. Prints {"ok", "wrong"}.
import http from 'node:http'
const [host, port, count] = process.argv.slice(2)
const agent = new http.Agent({ keepAlive: true, maxSockets: 4 })
let ok = 0
const wrong = []
function one(number) {
  const size = 10 + (number * 37) % 30000
  return new Promise((done) => {
    const path = `/size/${size}/node-${process.pid}-${number}`
    http.get({ host, port, path, agent }, (response) => {
      let length = 0
      response.on('data', (data) => { length += data.length })
      response.on('end', () => {
        if (response.statusCode === 200 && length === size && response.headers['x-tag'] === path.split('/').pop()) ok++
        else wrong.push(`${path}: ${response.statusCode} ${length}`)
        done()
      })
    }).on('error', (error) => { wrong.push(`${path}: ${error}`); done() })
  })
}
async function lane(first) { for (let number = first; number < Number(count); number += 4) await one(number) }
await Promise.all([0, 1, 2, 3].map(lane))
console.log(JSON.stringify({ ok, wrong: wrong.slice(0, 10) }))
agent.destroy()
