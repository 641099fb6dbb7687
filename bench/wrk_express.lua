-- What one request of a row looks like. Arguments after "--": head bytes, body bytes, requests before the client closes (0: never)
local head, body, close, path
local count = 0

function init(args)
  head, body, close, path = tonumber(args[1]), tonumber(args[2]), tonumber(args[3]), args[4] or "/"
  local method = body > 0 and "POST" or "GET"
  local function make(connection)
    local fixed = method .. " " .. path .. " HTTP/1.1\r\nHost: express-web\r\n" .. connection
    if body > 0 then fixed = fixed .. "Content-Length: " .. body .. "\r\n" end
    local pad = math.max(1, head - #fixed - #"X-Pad: \r\n\r\n")
    return fixed .. "X-Pad: " .. string.rep("p", pad) .. "\r\n\r\n" .. string.rep("b", body)
  end
  keep, last = make(""), make("Connection: close\r\n")
end

function request()
  count = count + 1
  if close > 0 and count % close == 0 then return last end
  return keep
end
