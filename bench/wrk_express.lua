-- What one request of a row looks like. Arguments after "--": head bytes, body bytes, requests before the client closes (0: never),
-- path. A client that never closes sends the same bytes each time: without a global `request`, wrk makes them once.
local count = 0

function init(args)
  local head, body, close = tonumber(args[1]), tonumber(args[2]), tonumber(args[3])
  wrk.method, wrk.path = body > 0 and "POST" or "GET", args[4] or "/"
  wrk.headers["Host"] = "express-web"
  if body > 0 then wrk.body = string.rep("b", body) end
  local function make(connection)
    wrk.headers["Connection"], wrk.headers["X-Pad"] = connection, "p"
    wrk.headers["X-Pad"] = string.rep("p", math.max(1, head + body - #wrk.format() + 1))
    return wrk.format()
  end
  if close > 0 then
    local last = make("close")
    local keep = make(nil)
    function request()
      count = count + 1
      return count % close == 0 and last or keep
    end
  else
    make(nil)
  end
end
